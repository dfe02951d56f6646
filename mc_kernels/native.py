"""The native library: whether it is there, and how a tensor is handed to it.

`_C` takes addresses and integers (csrc/bindings.cpp), so nothing here or there depends on torch's own headers.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# MC_NATIVE names the folder of another build, such as one with sanitizers (see `make sanitize`).
FOLDER = Path(os.environ.get("MC_NATIVE") or Path(__file__).parent / "_native")
# (address, dtype code, sizes, strides in elements)
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]


# What `threads` says of the present choice.
_threads = "the library's own"


@functools.cache
def _load() -> Any:
    """The extension module, or the reason why there is none."""
    name = "mc_kernels._native._C"
    spec = importlib.machinery.PathFinder.find_spec(name, [str(FOLDER)])
    try:
        if spec is None or spec.loader is None:
            raise ImportError(f"nothing of that name in {FOLDER}", name=name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _use_threads(module, of_torch=True)
        return module
    except ImportError as e:
        reason = FOLDER / "not_built.txt"
        if reason.exists():
            return f"native code was not built: {reason.read_text().strip()}"
        built = [p.name for p in FOLDER.glob("_C*")]
        return f"native code does not load: {e}" if built else "native code was not built (reinstall the package)"


def available() -> str | None:
    """Why the native library cannot serve here, or None."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> Any:
    """The extension module; RuntimeError with the reason where there is none."""
    reason = available()
    if reason is not None:
        raise RuntimeError(reason)
    return _load()


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


@functools.cache
def dtype_code(dtype: torch.dtype) -> int:
    """The library's number of a dtype."""
    names = {
        torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.int64: "I64",
    }  # fmt: skip
    return getattr(library(), names[dtype])


def view(x: Tensor) -> View:
    """`x` as the library takes it. The caller keeps `x` alive."""
    return x.data_ptr(), dtype_code(x.dtype), tuple(x.shape), x.stride()


def address(x: Tensor | None) -> int:
    """Address of a contiguous array, 0 for None and for an empty one."""
    return 0 if x is None else x.data_ptr()


# Slowest first; the flag: whether it differs from the one before it in more than matrix products.
_LEVELS = {
    "amx-emulated": False, "scalar": True, "avx2": True, "avx512": True, "avx512bf16": True, "amx": False,
}  # fmt: skip


def isa_levels(*, matrix: bool = True) -> list[str]:
    """Names of the instruction set levels of this build and machine, slowest first; none without the library.

    matrix: with those that differ from others in their matrix products alone.
    """
    if available() is not None:
        return []
    return [name for name, apart in _LEVELS.items() if (matrix or apart) and library().cpu_isa_available(name)]
