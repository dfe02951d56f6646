"""Settings of the server, checked once."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..sampling import SamplingParams


@dataclass(frozen=True)
class ServeSettings:
    """root: directory of the memories, one folder each. model_name: what `/v1/models` and requests call the model.

    token: what clients send as `Authorization: Bearer`; needed unless host is a loopback address. session: what every
    memory is opened with (arguments of `Session.open`). sampling: what a request that does not say gets.
    max_memories: folders in root. max_memory_tokens: of one memory. max_request_bytes: of one body.
    max_requests: under way and waiting, together; more are refused. max_open: memories that are open at the same time,
    each with a cache of `budget` slots; the one used longest ago is closed for another.
    """

    root: Path
    model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    session: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingParams = field(default_factory=lambda: SamplingParams(max_new_tokens=1024))
    max_memories: int = 1000
    max_memory_tokens: int = 10_000_000
    max_request_bytes: int = 4 * 2**20
    max_requests: int = 32
    max_open: int = 8

    def __post_init__(self) -> None:
        for name in ("max_memories", "max_memory_tokens", "max_request_bytes", "max_requests", "max_open"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name}: expected an integer of at least 1, got {value!r}")
        if isinstance(self.port, bool) or not isinstance(self.port, int) or not 0 <= self.port < 2**16:
            raise InputError(f"port: expected an integer from 0 to 65535, got {self.port!r}")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise InputError("token: expected printable ASCII text that is not empty")
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"root: {self.root} is a file; the memories need a directory")
        if self.token is None and not is_loopback(self.host):
            raise InputError(
                f"host: {self.host} can be reached from other machines, and no token is set; give --token, or "
                "MC_SERVE_TOKEN in the environment, or keep to 127.0.0.1"
            )

    def make_root(self) -> None:
        """The directory of the memories, where it does not exist. Raises InputError if it cannot be made."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"root: {self.root} cannot be made ({error.strerror}); check the path and its permissions"
            ) from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
