"""Imports of a library without another one that it would take along."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


@contextmanager
def hidden(name: str) -> Iterator[None]:
    """Within this context nothing can import the package `name`; afterwards all is as it was, whether it had been
    imported before or not."""
    kept: dict[str, ModuleType] = {x: sys.modules.pop(x) for x in list(sys.modules) if x.split(".")[0] == name}
    sys.modules[name] = None  # type: ignore[assignment]  # how Python is told that there is no such module
    try:
        yield
    finally:
        del sys.modules[name]
        sys.modules.update(kept)
