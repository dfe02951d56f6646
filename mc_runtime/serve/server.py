"""The server process: uvicorn around the application, and its end."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

import uvicorn

from ..model import LoadedModel
from ..session import Session
from .app import ServeApp
from .settings import ServeSettings


class Server(uvicorn.Server):
    """Ends on SIGINT or SIGTERM: no more requests, answers under way end after their present token and are kept, all
    memories are saved. A second SIGINT does not wait for that; the text is safe then too."""

    def __init__(self, settings: ServeSettings, model: LoadedModel) -> None:
        _try_session(settings, model)
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


def _try_session(settings: ServeSettings, model: LoadedModel) -> None:
    """Open a memory that is thrown away: settings that no memory can be opened with end the server now, and are not
    told to every client."""
    with TemporaryDirectory(prefix="mc-serve-") as folder:
        Session.open(Path(folder) / "memory", model, **settings.session).close()
