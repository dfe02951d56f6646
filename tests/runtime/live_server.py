"""A server of the tiny model on loopback, in a thread of the test's own process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from checks import SMALL

from mc_runtime.model import LoadedModel
from mc_runtime.sampling import SamplingParams
from mc_runtime.serve.server import Server
from mc_runtime.serve.settings import ServeSettings

MODEL = "tiny"


class Live:
    """A running server and clients for it."""

    def __init__(self, server: Server, port: int, token: str | None) -> None:
        self.server, self.port, self.token = server, port, token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": self.token or "none", "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def ask(self, text: str | list[dict[str, Any]], user: str = "ann", **options: Any) -> Any:
        """One completion; text alone is a conversation of one message."""
        messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
        with self.client() as client:
            return client.chat.completions.create(
                model=MODEL, messages=messages, user=user, **{"max_tokens": 8} | options
            )


@contextmanager
def live(root: Path, model: LoadedModel, **settings: Any) -> Iterator[Live]:
    """Serve the memories in `root` until the block ends, then shut down as on SIGTERM."""
    session = settings.pop("session", SMALL)
    sampling = SamplingParams(max_new_tokens=16)
    given = {"port": 0, "session": session, "sampling": sampling, "model_name": MODEL} | settings
    server = Server(ServeSettings(root=root, **given), model)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.01)
        yield Live(server, server.servers[0].sockets[0].getsockname()[1], given.get("token"))
    finally:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(60)
    assert not thread.is_alive()
