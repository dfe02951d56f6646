"""The CUDA library, without torch: where it is, and whether it loads.

`libmc_kernels_cuda` and its extension `_cuda` lie beside the CPU's (build_cuda.py). Tests run the same kernels without
a GPU, as plain C++ on emulated blocks and threads: `emulate(folder)` names a folder with that build, and memory is then
expected to be the CPU's.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import extension

_emulation: Path | None = None
# What `found` gives, once it has been asked since the choice was made.
_present: Any = None


@contextmanager
def emulate(folder: Path) -> Iterator[Any]:
    """Within this context the ops' CUDA kernels are those of the emulated build in `folder`. Yields its extension."""
    global _emulation, _present
    before, _emulation, _present = _emulation, folder, None
    try:
        yield library()
    finally:
        _emulation, _present = before, None


def emulated() -> bool:
    """Do kernels run on emulated threads, on the CPU?"""
    return _emulation is not None


@functools.cache
def load(folder: Path, name: str) -> Any:
    """The extension module, or the reason why there is none."""
    spec = importlib.machinery.PathFinder.find_spec(f"mc_kernels._native.{name}", [str(folder)])
    if spec is None or spec.loader is None:
        reason = folder / "cuda_not_built.txt"
        said = reason.read_text().strip() if reason.exists() else "reinstall the package where nvcc is"
        return f"the CUDA library was not built: {said}"
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except ImportError as e:
        return f"the CUDA library does not load: {e}"


def found() -> Any:
    """The extension module in use, or the reason why there is none."""
    global _present
    if _present is None:
        _present = load(extension.FOLDER, "_cuda") if _emulation is None else load(_emulation, "_cuda_emulated")
    return _present


def library() -> Any:
    """The extension module; RuntimeError with the reason where there is none."""
    module = found()
    if isinstance(module, str):
        raise RuntimeError(module)
    return module
