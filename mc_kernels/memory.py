"""Do two strided views share memory? Exact for the layouts of caches, from addresses and strides alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from .contracts import Strided

# Work units of numpy's solver; the layouts of caches need a handful.
MAX_WORK = 10_000
_shares_memory: Any = np.shares_memory  # its stub knows only two values of max_work


class _Bytes:
    """A view's address, shape and strides in bytes, as numpy's array interface. Nothing reads through it."""

    def __init__(self, x: Strided) -> None:
        size = x.element_size()
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "data": (x.data_ptr(), True),
            "shape": (*x.shape, size),
            "strides": (*(s * size for s in x.stride()), 1),
        }


def overlaps_itself(x: Strided) -> bool:
    """Whether two indices of `x` may name the same element: anything but nested strides counts as an overlap."""
    if x.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def shares_memory(a: Strided, b: Strided) -> bool:
    """Whether `a` and `b` have a byte in common. True where the answer is too hard to find."""
    if not a.numel() or not b.numel() or a.device != b.device:
        return False
    x, y = np.asarray(_Bytes(a)), np.asarray(_Bytes(b))
    if not np.may_share_memory(x, y):
        return False
    try:
        return bool(_shares_memory(x, y, max_work=MAX_WORK))
    except (np.exceptions.TooHardError, OverflowError):
        return True
