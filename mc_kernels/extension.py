"""The native library, without torch: where it is, whether it loads, and what its numbers mean.

`_C` takes addresses and integers (csrc/bindings.cpp), so it serves any library of arrays. `native` hands it torch's
tensors and threads, `array` everybody else's arrays.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import os
from pathlib import Path
from typing import Any

# MC_NATIVE names the folder of another build, such as one with sanitizers (see `make sanitize`).
FOLDER = Path(os.environ.get("MC_NATIVE") or Path(__file__).parent / "_native")
# (address, dtype code, sizes, strides in elements)
View = tuple[int, int, tuple[int, ...], tuple[int, ...]]
# The library's names of the dtypes that both torch and NumPy know by the other name.
DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "int64": "I64", "float8_e4m3fn": "F8E4M3",
}  # fmt: skip


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


@functools.cache
def dtype_code(name: str) -> int:
    """The library's number of a dtype."""
    return int(getattr(library(), DTYPES[name]))


# Slowest first; the flag: whether it differs from the one before it in more than matrix products.
_LEVELS = {
    "amx-emulated": False, "scalar": True, "avx2": True, "avx512": True, "avx512bf16": True, "amx": False,
    "neon": True, "neondot": True, "neonbf16": True,
}  # fmt: skip


def isa_levels(*, matrix: bool = True) -> list[str]:
    """Names of the instruction set levels of this build and machine, slowest first; none without the library.

    matrix: with those that differ from others in their matrix products alone.
    """
    if available() is not None:
        return []
    return [name for name, apart in _LEVELS.items() if (matrix or apart) and library().cpu_isa_available(name)]
