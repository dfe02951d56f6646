"""Which implementation of an operation serves a call.

`IMPLS[op][backend]` holds what has been registered. Every op has `ref`, the plain PyTorch oracle; `cpu`, `triton` and
`cuda` join as they are built. The selector sits *below* torch's dispatcher: the function that `torch.library` calls
asks `select` for an implementation, so `torch.compile`, autograd and fake tensors see one op whatever serves it.

`backend=None` means: the fastest registered implementation that is available and takes the input; each fallback is
logged once. On a GPU a table of measurements says which that is, call by call (`preference`). A backend that is named,
by argument or by the environment variable `MC_BACKEND`, and cannot serve raises `BackendError` with the reason.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from . import preference

logger = logging.getLogger("mc_kernels")

BACKENDS = ("ref", "cpu", "triton", "cuda")
# Fastest first. A backend missing here for a device can still be named (triton on CPU: the interpreter). On a GPU this
# is the order for calls that the table of `preference` has no measurement of; Triton has the backward passes.
PREFERENCE = {"cpu": ("cpu", "ref"), "cuda": ("triton", "cuda", "ref")}
ENV_BACKEND = "MC_BACKEND"


class BackendError(RuntimeError):
    """The named backend does not exist for the op, is not available here, or cannot take the input."""


def _always(*_: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Impl:
    """One implementation of one op.

    fn: takes the op's flat arguments (those of its torch schema without `backend`).
    available: reason why it cannot run on this machine at all, or None.
    supports: called with the op's arguments; reason why it cannot take them, or None.
    """

    op: str
    backend: str
    fn: Callable[..., Any]
    available: Callable[[], str | None] = _always
    supports: Callable[..., str | None] = _always


IMPLS: dict[str, dict[str, Impl]] = {}


def register(
    op: str,
    backend: str,
    *,
    available: Callable[[], str | None] = _always,
    supports: Callable[..., str | None] = _always,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that registers a function as the implementation of `op` on `backend` (a second one replaces it)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        table = IMPLS.setdefault(op, {})
        table[backend] = Impl(op, backend, fn, available, supports)
        for name in [b for b in BACKENDS if b in table]:  # the oracle first, in whatever order files are imported
            table[name] = table.pop(name)
        return fn

    return add


@functools.cache
def _log_fallback_once(op: str, wanted: str, taken: str, reason: str) -> None:
    logger.warning("%s: %s cannot serve (%s); using %s", op, wanted, reason, taken)


def _refusal(impl: Impl | None, op: str, args: tuple[Any, ...]) -> str | None:
    if impl is None:
        have = ", ".join(sorted(IMPLS.get(op, {}))) or "none"
        return f"not implemented (have: {have})"
    return impl.available() or impl.supports(*args)


def _order(op: str, device_type: str, args: tuple[Any, ...]) -> Sequence[str]:
    fallback = PREFERENCE.get(device_type, ("ref",))
    return preference.table().order(op, args, fallback) if device_type == "cuda" else fallback


def select(op: str, backend: str | None, device_type: str, args: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """The function that serves `op` for these arguments. Raises BackendError if the named backend cannot, ValueError if
    the table of measured backends is asked and malformed."""
    table = IMPLS.get(op, {})
    named = backend or os.environ.get(ENV_BACKEND) or None
    if named is not None:
        if named not in BACKENDS:
            raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {named!r}")
        reason = _refusal(table.get(named), op, args)
        if reason is not None:
            raise BackendError(f"{op}: backend {named!r} cannot serve: {reason}")
        return table[named].fn
    refused: list[tuple[str, str]] = []
    for name in _order(op, device_type, args):
        impl = table.get(name)
        if impl is None:
            continue
        reason = _refusal(impl, op, args)
        if reason is None:
            for wanted, why in refused:
                _log_fallback_once(op, wanted, name, why)
            return impl.fn
        refused.append((name, reason))
    why = "; ".join(f"{name}: {reason}" for name, reason in refused) or "nothing is registered"
    raise BackendError(f"{op}: no backend can serve on {device_type}: {why}")


def availability() -> dict[str, dict[str, str | None]]:
    """For each op and registered backend: None if it can run on this machine, else the reason why not."""
    return {op: {name: impl.available() for name, impl in table.items()} for op, table in IMPLS.items()}
