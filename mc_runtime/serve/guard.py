"""What is checked before a request is read: host, token, size."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import ServeSettings, is_loopback

# For those who watch the server; it says nothing about memories.
OPEN_PATHS = ("/health",)


class Guard:
    """ASGI middleware.

    With a token, every path but /health needs it. Without one the server listens on loopback alone, and takes requests
    that name a loopback host: a web page that has its own name point at 127.0.0.1 is sent away.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self.app, self.settings = app, settings
        self._token = None if settings.token is None else f"Bearer {settings.token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_host(headers.get("host", ""))
            if scope["path"] not in OPEN_PATHS:
                self._check_token(headers.get("authorization", ""))
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > self.settings.max_request_bytes:
                raise self._too_large()
        except ApiError as error:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _check_host(self, host: str) -> None:
        if self._token is not None:
            return
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            name = ""
        if not is_loopback(name):
            raise ApiError(403, "without a token this server answers to 127.0.0.1 and localhost", code="wrong_host")

    def _check_token(self, given: str) -> None:
        if self._token is None:
            return
        # In constant time. Header text is latin-1: any bytes that a client sends can be compared.
        if not hmac.compare_digest(given.encode("latin-1"), self._token):
            raise ApiError(
                401,
                "expected the server's token as `Authorization: Bearer TOKEN`",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )

    def _counted(self, receive: Receive) -> Receive:
        """Of a body whose length was not announced, no more is read than is allowed."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.settings.max_request_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        limit = self.settings.max_request_bytes
        return ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
