"""The routes: `/v1/chat/completions`, `/v1/models`, `/health`."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..model import LoadedModel
from .error_handlers import add_error_handlers
from .errors import ApiError
from .guard import Guard
from .history import Conversation
from .names import folder_of, memory_name
from .schema import ChatRequest, Envelope
from .service import Completion, Service
from .settings import ServeSettings


class ServeApp(FastAPI):
    """The application; `service` is there while it runs."""

    def __init__(self, settings: ServeSettings, model: LoadedModel) -> None:
        super().__init__(title="MegaContext", docs_url=None, redoc_url=None, lifespan=_lifespan)
        self.settings, self.model = settings, model
        self.service: Service | None = None
        self.add_middleware(Guard, settings=settings)
        add_error_handlers(self)
        started = int(time.time())
        card = {"id": settings.model_name, "object": "model", "created": started, "owned_by": "megacontext"}

        @self.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @self.get("/v1/models")
        async def models() -> dict[str, Any]:
            return {"object": "list", "data": [card]}

        @self.get("/v1/models/{name:path}")
        async def one_model(name: str) -> dict[str, Any]:
            self._check_model(name)
            return card

        @self.post("/v1/chat/completions", response_model=None)
        async def chat(
            body: ChatRequest, request: Request, x_session_id: Annotated[str | None, Header()] = None
        ) -> Response:
            self._check_model(body.model)
            sampling = body.sampling(settings.sampling)
            given_as = "user" if x_session_id is None else "X-Session-ID"
            folder = folder_of(memory_name(x_session_id, body.user), given_as)
            assert self.service is not None, "requests come between startup and shutdown"
            completion = self.service.start(folder, Conversation.of(body.messages), sampling)
            envelope = Envelope(f"chatcmpl-{uuid.uuid4().hex}", settings.model_name, model.fingerprint)
            with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
            watch = asyncio.create_task(_stop_when_gone(request, completion))
            try:
                if not body.stream:
                    text = "".join([piece async for piece in completion])
                    return JSONResponse(envelope.completion(text, completion.finish_reason, completion.usage))
                first = await completion.next()  # what is refused is refused before the stream begins
            except BaseException:
                completion.stop()
                raise
            finally:
                watch.cancel()
            return StreamingResponse(
                _events(first, completion, envelope, with_usage),
                media_type="text/event-stream",
                headers={"cache-control": "no-cache"},
            )

    def _check_model(self, name: str) -> None:
        if name != self.settings.model_name:
            known = self.settings.model_name
            raise ApiError(404, f"there is no model {name!r} here; there is {known!r}", code="model_not_found")


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    assert isinstance(app, ServeApp)
    app.service = Service(app.settings, app.model)
    yield
    await app.service.close()


async def _stop_when_gone(request: Request, completion: Completion) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    completion.stop()


async def _events(
    first: str | None, completion: Completion, envelope: Envelope, with_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. The last of them follow when the turn is durable."""
    try:
        yield _event(envelope.chunk({"role": "assistant", "content": ""}))
        piece = first
        while piece is not None:
            yield _event(envelope.chunk({"content": piece}))
            piece = await completion.next()
        yield _event(envelope.chunk({}, completion.finish_reason))
        if with_usage:
            yield _event(envelope.chunk(None, usage=completion.usage))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        completion.stop()


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
