"""Rivals: one module each. `bench/README.md` says how to add one.

A peer module defines

    NAME                                what the table shows
    missing(device) -> str | None       why it cannot run here (a package that is absent, a device that is wrong)
    offers(workload) -> list[Candidate] ways to do this workload; empty where it has no such operation
    SLOW_TO_START = True                optional: preparing takes many seconds (a compiler, a model)

and imports the rival's package inside functions, so that an absent one costs nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def peers() -> dict[str, ModuleType]:
    """Every peer module, by its NAME."""
    modules = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return {m.NAME: m for m in modules if hasattr(m, "NAME")}


def slow_to_start(peer: ModuleType) -> bool:
    return bool(getattr(peer, "SLOW_TO_START", False))
