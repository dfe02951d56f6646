"""Checks of what is handed to a transaction, made before anything is written."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mc_runtime.errors import InputError
from mc_runtime.tree.layout import kind_of
from mc_runtime.tree.spec import TreeSpec


def integers(values: object, name: str) -> npt.NDArray[np.integer]:
    """`values` (array, CPU or device tensor, sequence) as a 1-D integer array. Raises `InputError`."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be a flat sequence of integers: {error}") from None
    if array.ndim != 1:
        raise InputError(f"{name} must have one dimension, not shape {array.shape}")
    if array.size == 0:
        return np.empty(0, np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        raise InputError(f"{name} must be integers, not {array.dtype}")
    return array


def token_ids(ids: object, vocab_size: int) -> npt.NDArray[np.uint32]:
    """Token ids as contiguous uint32 `[n]`. Raises `InputError` naming the first id outside [0, vocab_size)."""
    array = integers(ids, "token ids")
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        first = int(bad.argmax())
        raise InputError(f"token id {array[first]} at position {first} is not in [0, {vocab_size})")
    return np.ascontiguousarray(array, np.dtype("<u4"))


def rows(value: object, shape: Sequence[int], dtype: torch.dtype, name: str, first: int) -> Tensor:
    """`value` as a contiguous CPU tensor of `dtype`, checked to have `shape` and finite values.

    `first` is the index of the first node, for the message. Values are looked at after the conversion, so that
    one too large for float16 is refused too. Raises `InputError`.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"{name} must be a floating-point tensor, not {kind}")
    if tuple(value.shape) != tuple(shape):
        raise InputError(f"{name} must have shape {list(shape)}, not {list(value.shape)}")
    stored = value.detach().to(device="cpu", dtype=dtype).contiguous()
    finite = torch.isfinite(stored)
    if not bool(finite.all()):
        node = int((~finite.reshape(len(stored), -1).all(1)).nonzero()[0])
        raise InputError(f"{name} of node {first + node} (row {node}) is not finite in {str(dtype)[6:]}")
    return stored


def optional_rows(
    spec: TreeSpec,
    n: int,
    first: int,
    hidden: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    *,
    contextual: bool,
) -> dict[str, Tensor]:
    """Kind of file -> checked rows of n nodes from `first` on, for the parts that are given.

    Keys and values `[n, L, Hkv, D]` become one row `[2, L, Hkv, D]` per node.
    """
    parts = {}
    if hidden is not None:
        shape: tuple[int, ...] = (n, spec.embed_dim)
        parts[kind_of("hidden", contextual)] = rows(hidden, shape, spec.torch_dtype, "hidden", first)
    if k is not None:
        shape = (n, *spec.kv_shape)
        both = [rows(x, shape, spec.torch_dtype, name, first) for x, name in ((k, "k"), (v, "v"))]
        parts[kind_of("kv", contextual)] = torch.stack(both, 1)
    return parts


def text(value: object, name: str) -> str:
    """`value`, checked to be a string that UTF-8 can hold. Raises `InputError`."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid text: {error.reason} at character {error.start}") from None
    return value


def as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    """The memory of a contiguous CPU tensor as flat uint8."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def span(start: int, stop: int | None, count: int, name: str) -> tuple[int, int]:
    """[start, stop) with None meaning `count`. Raises `InputError` unless 0 <= start <= stop <= count."""
    end = count if stop is None else stop
    if not 0 <= start <= end <= count:
        raise InputError(f"{name} {start} to {end} do not exist: there are {count}")
    return start, end
