"""Which arguments Triton compiles a kernel anew for: integers that are 1 or multiples of 16, unless it is told not to.

A kernel names in `do_not_specialize` what changes from call to call, lengths above all; else a decoder that grows its
cache, or training on sequences of any length, stops for seconds each time a length first is, or is not, a multiple.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def unspecialised(kernel: Any, option: str = "do_not_specialize") -> frozenset[str]:
    """Names that `option` of `triton.jit` lists; of a compiled kernel or an interpreted one."""
    names = getattr(kernel, option, None) or getattr(kernel, "kwargs", {}).get(option)
    return frozenset(names or ())


def specialise(
    kernel: Any, arguments: Mapping[str, Any], types: Mapping[Any, str]
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Signature, constants and the arguments that count as multiples of 16, as in a call with these arguments; types:
    names of pointers by dtype. Tensors count as aligned: torch's allocator aligns."""
    free = unspecialised(kernel)
    unaligned = free | unspecialised(kernel, "do_not_specialize_on_alignment")
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for name, x in arguments.items():
        if x is None or (isinstance(x, int) and x == 1 and name not in free):
            signature[name], constants[name] = "constexpr", x
            continue
        if isinstance(x, Tensor):
            signature[name] = types[x.dtype]
        else:
            signature[name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
        if name not in unaligned and (isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0)):
            aligned.append(name)
    return signature, constants, tuple(aligned)
