"""What checks of tensors and of other arrays share: errors name the argument, what was expected and what came.

Nothing here imports torch. A value is anything with the few methods of `Strided`; `describe` learns of further kinds by
`describe.register`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol


class Strided(Protocol):
    """What the checks ask of an array, in torch's words: strides in elements."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def device(self) -> Any: ...
    def dim(self) -> int: ...
    def numel(self) -> int: ...
    def stride(self) -> tuple[int, ...]: ...
    def data_ptr(self) -> int: ...
    def element_size(self) -> int: ...


@functools.singledispatch
def describe(value: object) -> str:
    """What came, in a few words. Plans, specs and weights exist twice, on tensors and on arrays: they are told apart by
    their full names, without their numbers."""
    kind = type(value)
    if kind.__module__.startswith("mc_kernels.") and not isinstance(value, tuple):
        arrays = kind.__module__.startswith(("mc_kernels.array.", "mc_kernels.splicing"))
        return f"a mc_kernels.{'array.' if arrays else ''}{kind.__name__}"
    return f"{kind.__name__} {value!r}"


def is_finite(value: float) -> bool:
    """math.isfinite, in words that torch can trace where a number is a compiled call's input."""
    return -math.inf < value < math.inf


def _dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def check_shape(name: str, value: Strided, shape: Sequence[int | str | None], dims: dict[str, int]) -> None:
    """Match `value.shape` against `shape`: an int must be equal, a name is bound in `dims` at its first use and must
    agree afterwards, None takes anything."""
    before = len(dims)
    if value.dim() == len(shape):
        for size, want in zip(value.shape, shape, strict=True):
            if want is not None and size != (dims.setdefault(want, size) if isinstance(want, str) else want):
                break
        else:
            return
    expected = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
    known = [f"{k}={v}" for k, v in list(dims.items())[:before] if k in shape]
    hint = f" with {', '.join(known)}" if known else ""
    raise ValueError(f"{name}: expected shape {expected}{hint}, got {describe(value)}")


def check_same_device(reference: tuple[str, Strided], **others: Strided | None) -> None:
    ref_name, ref = reference
    for name, value in others.items():
        if value is not None and value.device != ref.device:
            raise TypeError(f"{name}: expected device {ref.device} as {ref_name}, got {describe(value)}")


def check_same_dtype(reference: tuple[str, Strided], **others: Strided | None) -> None:
    ref_name, ref = reference
    for name, value in others.items():
        if value is not None and value.dtype != ref.dtype:
            raise TypeError(f"{name}: expected dtype {_dtype_name(ref.dtype)} as {ref_name}, got {describe(value)}")


def check_contiguous_rows(name: str, value: Strided) -> None:
    if value.numel() and value.shape[-1] > 1 and value.stride()[-1] != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {list(value.stride())}")
