"""The server process: uvicorn around the application, and its end."""

from __future__ import annotations

from types import FrameType

import uvicorn

from ..model import LoadedModel
from .app import ServeApp
from .settings import ServeSettings


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM: no more requests, answers under way end after their present token and are kept, all
    memories are saved. A second SIGINT does not wait for that; the text is safe then too."""

    def __init__(self, settings: ServeSettings, model: LoadedModel) -> None:
        self.app = ServeApp(settings, model)
        # No proxy is believed: the only thing that is taken from headers is what a client may say anyway.
        config = uvicorn.Config(
            self.app, host=settings.host, port=settings.port, lifespan="on", proxy_headers=False, server_header=False
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.app.service is not None:
            self.app.service.close_soon()
        super().handle_exit(sig, frame)
