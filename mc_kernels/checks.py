"""Argument checks shared by the ops: errors name the argument, what was expected and what came.

`ValueError` for a bad value, shape or index; `TypeError` for a bad type, dtype or device. Ops run all checks before
anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# fp64 is taken by the oracles only, for gradcheck and for exact reference results.
ORACLE_DTYPES = (*FLOAT_DTYPES, torch.float64)
INDEX_DTYPES = (torch.int64, torch.int32)


def describe(value: object) -> str:
    """What came, in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)} on {value.device}"
    return f"{type(value).__name__} {value!r}"


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {describe(value)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: expected dtype {wanted}, got {describe(value)}")


def check_shape(name: str, value: Tensor, shape: Sequence[int | str | None], dims: dict[str, int]) -> None:
    """Match `value.shape` against `shape`: an int must be equal, a name is bound in `dims` at its first use and must
    agree afterwards, None takes anything."""
    before = len(dims)
    if value.dim() == len(shape):
        for size, want in zip(value.shape, shape, strict=True):
            if want is not None and size != (want if isinstance(want, int) else dims.setdefault(want, size)):
                break
        else:
            return
    expected = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
    known = [f"{k}={v}" for k, v in list(dims.items())[:before] if k in shape]
    hint = f" with {', '.join(known)}" if known else ""
    raise ValueError(f"{name}: expected shape {expected}{hint}, got {describe(value)}")


def check_same_device(reference: tuple[str, Tensor], **others: Tensor | None) -> None:
    ref_name, ref = reference
    for name, value in others.items():
        if value is not None and value.device != ref.device:
            raise TypeError(f"{name}: expected device {ref.device} as {ref_name}, got {describe(value)}")


def check_same_dtype(reference: tuple[str, Tensor], **others: Tensor | None) -> None:
    ref_name, ref = reference
    for name, value in others.items():
        if value is not None and value.dtype != ref.dtype:
            wanted = str(ref.dtype).removeprefix("torch.")
            raise TypeError(f"{name}: expected dtype {wanted} as {ref_name}, got {describe(value)}")


def check_contiguous_rows(name: str, value: Tensor) -> None:
    if value.numel() and value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for the kernels' dtypes; fp64 stays fp64 (oracle)."""
    return torch.float64 if dtype == torch.float64 else torch.float32
