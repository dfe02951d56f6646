"""Memory of the CPU in pages of 2 MB, where the system gives them on request (Linux's transparent huge pages).

A decode step reads every weight once. In pages of 4 KB that is an address to look up for each, 65,000 for a model of
270 MB, and in a virtual machine through two tables: the read alone takes up to twice as long (bench/README.md). What
is touched anywhere is there as a whole page, so a cache takes its full size from the first entries on.
"""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

PAGE = 2 << 20
# Smaller tensors come from torch: a few of them would waste most of a page.
LEAST_BYTES = 256 << 10
# Mapped at once; memory that nobody has touched costs nothing.
CHUNK = 64 << 20
ALIGNMENT = 64


class HugePages:
    """Hands out tensors one behind the other, each with a storage of its own. The memory of a chunk is given back with
    the last tensor in it. What is asked for another device, or on a system without such pages, comes from torch."""

    def __init__(self, chunk: int = CHUNK) -> None:
        self._chunk = chunk
        self._memory: mmap.mmap | None = None
        self._next = self._end = 0

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None = None) -> Tensor:
        """Of a shape, contiguous."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        if size < LEAST_BYTES or not _on_cpu(device) or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.zeros(shape, dtype=dtype, device=device)
        if self._memory is None or self._next + size > self._end:
            self._map(max(size, self._chunk))
        assert self._memory is not None
        x = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._next)
        self._next += -(-size // ALIGNMENT) * ALIGNMENT
        return x.view(shape)

    def _map(self, size: int) -> None:
        """A chunk that begins on a page and has only whole ones: what Linux then backs by huge pages."""
        whole = -(-size // PAGE) * PAGE
        memory = mmap.mmap(-1, whole + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them: the pages stay small
            memory.madvise(mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
        self._memory, self._next, self._end = memory, start, start + whole


def _on_cpu(device: torch.device | str | None) -> bool:
    place = torch.get_default_device() if device is None else torch.device(device)
    return place.type == "cpu"
