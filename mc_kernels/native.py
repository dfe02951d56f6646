"""The native library as torch's ops use it: how a tensor is handed over, and on whose threads the code runs."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import extension
from .extension import View, available, isa_levels

__all__ = [
    "View",
    "address",
    "array",
    "available",
    "dtype_code",
    "isa_levels",
    "library",
    "threads",
    "use_torch_threads",
    "vectorised",
    "view",
]

# What `threads` says of the present choice.
_threads = "the library's own"


def library() -> Any:
    """The extension module, on torch's threads from the first call on; RuntimeError with the reason where there is
    none."""
    module = extension.library()
    _lend_threads()
    return module


@functools.cache
def _lend_threads() -> None:
    _use_threads(extension.library(), of_torch=True)


def _use_threads(module: Any, of_torch: bool) -> None:
    global _threads
    if not of_torch:
        module.use_own_threads()
        _threads = "the library's own"
        return
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    file = Path(torch.__file__).parent / "lib" / name
    try:
        _threads = f"torch's OpenMP ({module.use_openmp_of(str(file) if file.exists() else name)})"
    except RuntimeError as e:
        _threads = f"the library's own: {e}"


def use_torch_threads(yes: bool = True) -> None:
    """Run native code on the threads of torch's OpenMP runtime, as it does from the start where that is found, or
    (False) on the library's own. A child of fork() has the latter: OpenMP hangs there once the parent has used it."""
    _use_threads(library(), yes)


def threads() -> str:
    """Whose threads run native code in this process, and if not torch's, why."""
    library()
    return _threads


def vectorised() -> bool:
    """Whether the library is there and the instruction set level in use has vectors. Without, torch's matrix products
    are several times as fast."""
    return available() is None and library().cpu_isa() not in ("scalar", "amx-emulated")


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The library's number of a dtype."""
    return extension.dtype_code(str(dtype).removeprefix("torch."))


def view(x: Tensor) -> View:
    """`x` as the library takes it. The caller keeps `x` alive."""
    return x.data_ptr(), dtype_code(x.dtype), tuple(x.shape), x.stride()


def array(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` contiguous, on the CPU, in a dtype: `x` itself where it is so already, since asking torch to convert it costs
    more than the look."""
    if x is None or (x.dtype is dtype and x.is_cpu and x.is_contiguous()):
        return x
    return x.to("cpu", dtype).contiguous()


def address(x: Tensor | None) -> int:
    """Address of a contiguous array, 0 for None and for an empty one."""
    return 0 if x is None else x.data_ptr()
