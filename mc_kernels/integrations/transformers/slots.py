"""Slots of a Working Context, and what a forward reads and writes in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...checks import check_same_dtype
from .positioned import PositionedCache, PositionedLayer, check_no_gradient

# Rows of the batch, which of the entries that are run, and the slots that they go to.
Place = tuple[slice, Tensor | slice, Tensor | slice]


class SlotLayer(PositionedLayer):
    """One layer's view of the cache: `keys`, `values` [B, Hkv, S, D], keys unrotated."""

    is_croppable = True

    def __init__(self, cache: SlotCache, number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number

    def bind(self) -> None:
        """Point at the cache's memory, again after that was replaced."""
        self.keys, self.values = self.cache.data[self.number, 0], self.cache.data[self.number, 1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write [B, Hkv, T, D] to the slots that `begin` chose; gives all that are in use."""
        check_no_gradient(key_states, value_states)
        return self.cache.write(self.number, key_states, value_states)


class SlotCache(PositionedCache):
    """B rows of S slots: data [L, 2, B, Hkv, S, D], unrotated keys; pos [B, S] int64, -1: empty.

    Slots [0, lengths[b]) of row b are in use; an entry's position is its rank in the timeline. A forward appends what
    it is given to every row; padding takes no slot.
    """

    data: Tensor
    pos: Tensor

    def __init__(self, data: Tensor, pos: Tensor) -> None:
        """data zeroed, so that a masked slot never brings a NaN into a product; pos -1."""
        self._layers = [SlotLayer(self, number) for number in range(len(data))]
        super().__init__(self._layers)
        self._take(data, pos, [torch.zeros(0, dtype=torch.int64)] * len(pos))

    def _take(self, data: Tensor, pos: Tensor, slots: list[Tensor]) -> None:
        self.data, self.pos, self._slots = data, pos, slots
        self._appended: list[int] | None = None
        self._targets: list[int] | None = None
        for layer in self._layers:
            layer.bind()

    @property
    def k(self) -> Tensor:
        """[L, B, Hkv, S, D] view, unrotated."""
        return self.data[:, 0]

    @property
    def v(self) -> Tensor:
        """[L, B, Hkv, S, D] view."""
        return self.data[:, 1]

    @property
    def batch_size(self) -> int:
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    @property
    def lengths(self) -> list[int]:
        """Entries of each row."""
        return [len(slots) for slots in self._slots]

    def _number(self, row: int) -> None:
        """Positions of a row become ranks."""
        slots = self._slots[row].to(self.pos.device)
        self.pos[row].fill_(-1)
        self.pos[row, slots] = torch.arange(len(slots), device=self.pos.device)

    def begin(self, batch: int, length: int, keep: Tensor | None) -> None:
        if batch != self.batch_size:
            raise ValueError(
                f"cache: expected input of {self.batch_size} rows, got {batch}; give batch_size={batch}, or "
                "batch_repeat_interleave a cache of one row"
            )
        self.rollback()
        if self._targets is None:
            self._begin_append(length, keep)
        else:
            self._begin_rewrite(length, keep)
        self.kv_pos = self.pos[:, : self._used].contiguous()

    def _begin_append(self, length: int, keep: Tensor | None) -> None:
        kept = None if keep is None else keep.cpu()
        counts = [length] * self.batch_size if kept is None else kept.sum(1).tolist()
        after = [n + count for n, count in zip(self.lengths, counts, strict=True)]
        if max(after) > self.capacity:
            raise ValueError(
                f"cache: {max(after)} entries do not fit its {self.capacity} slots; splice entries away, or give a "
                "larger capacity"
            )
        device = self.data.device
        self.q_pos = torch.full((self.batch_size, length), -1, dtype=torch.int64, device=device)
        self._places: list[Place] = []
        for row, (first, stop) in enumerate(zip(self.lengths, after, strict=True)):
            # Slots [0, n) are in use, so that a new entry's slot is its rank.
            ranks = torch.arange(first, stop, device=device)
            real = slice(None) if kept is None else kept[row].nonzero()[:, 0].to(device)
            self.q_pos[row, real] = ranks
            self.pos[row, first:stop] = ranks
            self._places.append((slice(row, row + 1), real, slice(first, stop)))
        if kept is None and len(set(after)) == 1:
            self._places = [(slice(None), slice(None), slice(after[0] - length, after[0]))]
        self._appended, self._used, self.reach = counts, max(after), max(after)

    def _begin_rewrite(self, length: int, keep: Tensor | None) -> None:
        assert self._targets is not None
        if length != len(self._targets) or keep is not None:
            raise ValueError(f"input: expected {len(self._targets)} entries without padding, as many as ranks")
        ranks = torch.tensor(self._targets, dtype=torch.int64)
        self.q_pos = ranks.to(self.data.device).repeat(self.batch_size, 1)
        self._places = [
            (slice(row, row + 1), slice(None), slots[ranks].to(self.data.device))
            for row, slots in enumerate(self._slots)
        ]
        self._used, self.reach = max(self.lengths), max(self._targets, default=-1) + 1

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a layer's `update` does."""
        check_same_dtype(("cache", self.data), key_states=k, value_states=v)
        for rows, source, slots in self._places:
            self.data[layer, 0, rows][:, :, slots] = k[rows][:, :, source]
            self.data[layer, 1, rows][:, :, slots] = v[rows][:, :, source]
        return self.data[layer, 0, :, :, : self._used], self.data[layer, 1, :, :, : self._used]

    def end(self, *, failed: bool) -> None:
        if failed:
            self.rollback()
        elif self._appended is not None:
            for row, count in enumerate(self._appended):
                first = len(self._slots[row])
                self._slots[row] = torch.cat((self._slots[row], torch.arange(first, first + count)))
            self._appended = None

    def rollback(self) -> None:
        """Forget the entries of a forward that did not end."""
        if self._appended is not None:
            self._appended = None
            for row in range(self.batch_size):
                self._number(row)
