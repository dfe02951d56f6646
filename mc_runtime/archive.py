"""Exact keys and values of collapsed token blocks, kept in memory for the way back."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class BlockArchive:
    """The last `capacity` collapsed blocks: block index -> (k, v) [L, Hkv, K, D] each, keys unrotated."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def put(self, block: int, k: Tensor, v: Tensor) -> None:
        if not self.capacity:
            return
        self._blocks.pop(block, None)
        self._blocks[block] = (k, v)
        while len(self._blocks) > self.capacity:
            self._blocks.popitem(last=False)

    def get(self, block: int) -> tuple[Tensor, Tensor] | None:
        return self._blocks.get(block)

    def copy(self) -> BlockArchive:
        """The same blocks, kept or dropped independently from here on."""
        other = BlockArchive(self.capacity)
        other._blocks = self._blocks.copy()
        return other

    def items(self) -> list[tuple[int, tuple[Tensor, Tensor]]]:
        """Oldest first."""
        return list(self._blocks.items())

    def __len__(self) -> int:
        return len(self._blocks)
