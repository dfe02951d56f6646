"""Buffers of Triton host code, taken one after the other out of one workspace of bytes, or only counted."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_ALIGNMENT = 256  # of every buffer, as torch's allocator aligns


class Arena:
    """`take` cuts the next buffer from `workspace` (uint8, contiguous, aligned to 256 bytes); without one it gives meta
    tensors, so that the same host code says how large a workspace has to be: `bytes`."""

    def __init__(self, workspace: Tensor | None) -> None:
        self.bytes = 0
        self._used = 0
        self._workspace = workspace

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        start = self._used
        size = math.prod(shape) * dtype.itemsize
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.bytes = max(self.bytes, self._used)
        if self._workspace is None:
            return torch.empty(shape, dtype=dtype, device="meta")
        return self._workspace[start : start + size].view(dtype).view(shape)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Buffers taken within are free again behind it (on one stream, whose kernels run in order)."""
        used = self._used
        yield
        self._used = used
