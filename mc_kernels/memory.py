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


Steps = list[tuple[int, int]]


def _reaches(distance: int, steps: Steps) -> bool:
    """Whether two indices of a view of nested steps lie `distance` bytes apart. What the smaller steps reach is less
    than a step, so of each only two numbers are possible."""
    if not steps:
        return distance == 0
    step, n = steps[0]
    low = distance // step
    return any(-n < i < n and _reaches(distance - i * step, steps[1:]) for i in (low, low + 1))


class Layout:
    """Which bytes a view names: its first and last one, and (step in bytes, number) of every dimension that has more
    than one index, largest step first, the bytes of an element last."""

    def __init__(self, x: Strided) -> None:
        self.x, self.first = x, x.data_ptr()
        size = x.element_size()
        steps = [(s * size, n) for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]
        steps.sort(reverse=True)
        self.steps: Steps = [*steps, (1, size)]
        self.last = self.first
        self.nested = True  # each step clears all that the smaller ones reach
        for step, n in reversed(self.steps):
            self.nested = self.nested and step > self.last - self.first
            self.last += step * (n - 1)

    def overlaps_itself(self) -> bool:
        """Whether two indices may name the same element: anything but nested strides counts as an overlap."""
        return self.x.numel() > 0 and not self.nested

    def shares(self, other: Layout) -> bool:
        """Whether the two have a byte in common. True where the answer is too hard to find."""
        if not self.x.numel() or not other.x.numel() or self.x.device != other.x.device:
            return False
        if self.last < other.first or other.last < self.first:
            return False
        if self.nested and self.steps == other.steps:  # keys and values of one cache: a tenth of the solver's time
            return _reaches(other.first - self.first, self.steps)
        try:
            return bool(_shares_memory(*(np.asarray(_Bytes(y.x)) for y in (self, other)), max_work=MAX_WORK))
        except (np.exceptions.TooHardError, OverflowError):
            return True


def overlaps_itself(x: Strided) -> bool:
    """See `Layout`."""
    return Layout(x).overlaps_itself()


def shares_memory(a: Strided, b: Strided) -> bool:
    """See `Layout.shares`."""
    return Layout(a).shares(Layout(b))
