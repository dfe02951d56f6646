"""Errors as OpenAI's API shapes them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import BudgetError, InputError, MegaContextError, StorageFullError, TreeLockedError

logger = logging.getLogger("mc_runtime.serve")

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
# The official clients repeat a request after these statuses, unless they are told that it is of no use.
NO_RETRY = {"x-should-retry": "false"}


class ApiError(Exception):
    """What a request is answered with instead of a completion."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """The answer to a request that met `error`. What a client cannot mend is logged; of a bug it gets no detail."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError | BudgetError):
        return ApiError(400, str(error), code="invalid_value")
    if isinstance(error, TreeLockedError):
        return ApiError(409, "another process is using this memory", code="memory_locked", headers=NO_RETRY)
    if isinstance(error, StorageFullError):
        logger.error("%s", error)
        return ApiError(507, "the server's disk is full; what was said before is safe", code="storage_full")
    if isinstance(error, MegaContextError):
        logger.error("%s", error)
        return ApiError(
            500, "the memory cannot be used; see the server's log", code="memory_unusable", headers=NO_RETRY
        )
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error; see the server's log", code="internal_error", headers=NO_RETRY)
