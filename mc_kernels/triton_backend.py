"""What the Triton versions of the ops share: whether they can run here, and how they are registered.

Triton is imported when a kernel is first called, not with the package: it is an optional dependency and takes a while.
Without a GPU the kernels run under Triton's interpreter, if `TRITON_INTERPRET=1` is set before that first call; the
registry never picks Triton for CPU tensors by itself, there it has to be named.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .registry import register
from .triton_assembler import use_sound_assembler


def interpreted() -> bool:
    """Do kernels run under Triton's interpreter, on the CPU?"""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def available() -> str | None:
    """Reason why Triton kernels cannot run on this machine, or None."""
    if not _installed():
        return "Triton is not installed (pip install 'megacontext[triton]')"
    # torch asks the driver anew at every call.
    if not torch.cuda.is_initialized() and not interpreted() and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def power_of_two(n: int) -> int:
    """The least power of two that is n or more, as a tile's sides are. (Triton's own function needs Triton.)"""
    return 1 << max(0, n - 1).bit_length()


def refuse_device(tensors: Iterable[Tensor | None]) -> str | None:
    """Reason why Triton cannot take tensors that live where these do, or None."""
    if interpreted():
        other = next((x for x in tensors if x is not None and not x.is_cpu), None)
        words = "expected cpu tensors (Triton is interpreted: TRITON_INTERPRET is set)"
    else:
        other, words = next((x for x in tensors if x is not None and not x.is_cuda), None), "expected cuda tensors"
    return None if other is None else f"{words}, got {other.device}"


def refuse_fp64(tensors: Iterable[Tensor | None]) -> str | None:
    """fp64 is for the oracle: reason, or None."""
    return "fp64 is for the oracle" if any(x is not None and x.dtype == torch.float64 for x in tensors) else None


def refuse(*args: object) -> str | None:
    """`supports` of most ops: every tensor among the arguments on the right device, none of them fp64."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    return refuse_device(tensors) or refuse_fp64(tensors)


def register_triton(
    op: str, module: str, function: str, supports: Callable[..., str | None] = refuse
) -> Callable[..., Any]:
    """Register `module.function` as the Triton version of `op`; the module is imported at the first call."""

    imported: ModuleType | None = None

    def call(*args: Any) -> Any:
        nonlocal imported
        if imported is None:
            if not interpreted():
                use_sound_assembler()
            imported = importlib.import_module(module)
        return getattr(imported, function)(*args)

    call.__name__ = function
    return register(op, "triton", available=available, supports=supports)(call)
