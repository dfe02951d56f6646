"""Argument checks shared by the ops: errors name the argument, what was expected and what came.

`ValueError` for a bad value, shape or index; `TypeError` for a bad type, dtype or device. Ops run all checks before
anything is written. What needs no torch is in `contracts`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .contracts import check_contiguous_rows, check_same_device, check_same_dtype, check_shape, describe, is_finite

__all__ = [
    "CACHE_DTYPES",
    "FLOAT_DTYPES",
    "FP8",
    "INDEX_DTYPES",
    "ORACLE_DTYPES",
    "accumulate_dtype",
    "can_look_at",
    "can_read",
    "check_contiguous_rows",
    "check_same_device",
    "check_same_dtype",
    "check_shape",
    "check_tensor",
    "describe",
    "is_finite",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp64 is taken by the oracles only, for gradcheck and for exact reference results.
ORACLE_DTYPES = (*FLOAT_DTYPES, torch.float64)
# Of keys and values that a cache stores in a byte, beside a scale.
FP8 = torch.float8_e4m3fn
CACHE_DTYPES = (*ORACLE_DTYPES, FP8)
INDEX_DTYPES = (torch.int64, torch.int32)


@describe.register
def _(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {describe(value)}")


def can_look_at(*tensors: Tensor) -> bool:
    """Whether values and addresses of tensors can be checked: not while torch compiles, and not where tensors have a
    shape alone (fake ones, those on `meta`)."""
    if torch.compiler.is_compiling():
        return False
    return not any(x.is_meta or isinstance(x, FakeTensor) for x in tensors)


def can_read(*tensors: Tensor) -> bool:
    """Whether values of tensors can be read: as `can_look_at`, and not on a GPU while a CUDA graph is captured, which a
    copy to the host would end with an error. Where they lie on a GPU, reading them waits for it."""
    return can_look_at(*tensors) and not (any(x.is_cuda for x in tensors) and torch.cuda.is_current_stream_capturing())


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the kernels' dtypes; fp64 stays fp64 (oracle)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
