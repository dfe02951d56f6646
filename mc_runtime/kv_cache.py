"""The slot cache: keys and values of the Working Context.

One allocation `[L, 2, B, Hkv, S, D]`. Keys are unrotated and a slot's place in memory means nothing: attention masks
and rotates by `pos`, so entries can be put into any free slot and renumbered for free. Slots [0, used) of a row are in
use; `pos` is -1 elsewhere. `bias` is what a slot's entry is weighed by: a log-weight that every head's logits get.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import SplicePlan, kv_splice_
from mc_kernels.decoder_layers import CacheSlots

from .huge_pages import HugePages
from .model import ModelConfig


class KVCache:
    """Keys, values, positions and weights of B rows of S slots.

    data [L, 2, B, Hkv, S, D]; k, v [L, B, Hkv, S, D]: views of it; pos [B, S] int64; bias [B, S] fp32, or None where
    all entries weigh alike. `row(b)` is a view: what is written through it lands here.
    """

    def __init__(self, data: Tensor, pos: Tensor, bias: Tensor | None = None) -> None:
        self.data, self.pos, self.bias = data, pos, bias
        self.k, self.v = data[:, 0], data[:, 1]

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        capacity: int,
        *,
        batch: int = 1,
        dtype: torch.dtype,
        device: torch.device | str,
        weighted: bool = False,
    ) -> KVCache:
        """Zeroed, so that a masked slot can never bring a NaN into a product. weighted: with a `bias`."""
        shape = (config.n_layers, 2, batch, config.n_kv_heads, capacity, config.head_dim)
        data = HugePages(chunk=0).zeros(shape, dtype, device)
        bias = torch.zeros(batch, capacity, device=device) if weighted else None
        return cls(data, torch.full((batch, capacity), -1, dtype=torch.int64, device=device), bias)

    @property
    def batch(self) -> int:
        return self.data.shape[2]

    @property
    def capacity(self) -> int:
        return self.data.shape[4]

    def row(self, b: int) -> KVCache:
        bias = None if self.bias is None else self.bias[b : b + 1]
        return KVCache(self.data[:, :, b : b + 1], self.pos[b : b + 1], bias)

    def stacked(self, copies: int) -> KVCache:
        """A new cache of `copies` rows, each a copy of this cache's single row."""
        if self.batch != 1:
            raise ValueError(f"stacked: expected a cache of one row, got {self.batch}")
        bias = None if self.bias is None else self.bias.repeat(copies, 1)
        return KVCache(self.data.repeat(1, 1, copies, 1, 1, 1), self.pos.repeat(copies, 1), bias)

    def widened(self, capacity: int) -> KVCache:
        """A copy with room for `capacity` slots in each row."""
        extra = capacity - self.capacity
        if extra < 0:
            raise ValueError(f"capacity: expected at least {self.capacity}, got {capacity}")
        bias = None if self.bias is None else F.pad(self.bias, (0, extra))
        return KVCache(F.pad(self.data, (0, 0, 0, extra)), F.pad(self.pos, (0, extra), value=-1), bias)

    def gather(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of row 0's keys and values at `slots [M]`: [L, Hkv, M, D] each."""
        return self.k[:, 0].index_select(2, slots), self.v[:, 0].index_select(2, slots)

    def splice(self, plan: SplicePlan, k_new: Tensor, v_new: Tensor, bias: Tensor | None = None) -> None:
        """Edit row 0 in place: remove and insert entries (k_new, v_new [L, Hkv, M, D], keys unrotated) and give every
        entry its rank as position; bias as in `set_ranks`."""
        kv_splice_(self.k[:, 0], self.v[:, 0], k_new, v_new, plan)
        self.set_ranks(plan.new_slots, bias)

    def set_ranks(self, slots: Tensor, bias: Tensor | None = None) -> None:
        """Positions of row 0 become ranks: `slots [n]` names the slot of rank 0, 1, ...; every other slot is empty.
        bias: [n] log-weights by rank, None: 0; an empty slot's is 0. Raises ValueError for a cache without weights."""
        if bias is not None and self.bias is None:
            raise ValueError("bias: expected None for a cache that was not allocated as weighted")
        self.pos[0].fill_(-1)
        self.pos[0, slots] = torch.arange(len(slots), device=self.pos.device)
        if self.bias is not None:
            self.bias[0].zero_()
            if bias is not None:
                self.bias[0, slots] = bias

    def writer(self, slots: Tensor, used: int, *, repeats: bool = False) -> SlotWriter:
        return SlotWriter(self, slots, used, repeats=repeats)


class SlotWriter:
    """Where a forward writes its keys and values: slots [B, T] of a cache (the model's `KVStore`).

    All T entries of a layer are written before the layer attends, so entries of one forward see each other as far as
    their positions allow. Only slots [0, used) are attended to. repeats: see `KVStore`.
    """

    def __init__(self, cache: KVCache, slots: Tensor, used: int, *, repeats: bool = False) -> None:
        if slots.dim() != 2 or slots.shape[0] != cache.batch:
            raise ValueError(f"slots: expected [B={cache.batch}, T], got {list(slots.shape)}")
        self.cache, self.used, self.slots, self.repeats = cache, used, slots, repeats
        self.kv_bias = None if cache.bias is None else cache.bias[:, :used]
        self.pos = cache.pos[:, :used]

    @functools.cached_property
    def _span(self) -> slice | None:
        """A run of neighbouring slots, the same in each row, is one strided copy instead of a scatter."""
        first, count = int(self.slots[0, 0]) if self.slots.numel() else 0, self.slots.shape[1]
        run = torch.arange(first, first + count, device=self.slots.device)
        return slice(first, first + count) if bool((self.slots == run).all()) else None

    # Views of all layers' keys and values are made at once: one by one they cost a decode step a few percent.

    @functools.cached_property
    def _seen(self) -> tuple[Tensor, ...]:
        return self.cache.data.flatten(0, 1)[..., : self.used, :].unbind()

    @functools.cached_property
    def _written(self) -> tuple[Tensor, ...]:
        rows = self.cache.data.flatten(0, 1)
        return (rows if self._span is None else rows[..., self._span, :]).unbind()

    def in_slots(self) -> CacheSlots:
        """For layers that are run as one call."""
        return CacheSlots(self.cache.k, self.cache.v, self.slots, self.pos, self.kv_bias)

    def whole_cache(self) -> CacheSlots:
        """For layers that are recorded once for any number of entries."""
        c = self.cache
        return CacheSlots(c.k, c.v, self.slots, c.pos, c.bias)

    def begin(self, positions: Tensor) -> None:
        """What all layers read alike is brought into one piece once a forward."""
        self.pos = self.cache.pos[:, : self.used].contiguous()
        if self.cache.bias is not None:
            self.kv_bias = self.cache.bias[:, : self.used].contiguous()

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for i, new in ((2 * layer, k), (2 * layer + 1, v)):
            if self._span is not None:
                self._written[i].copy_(new)
            elif self.cache.batch == 1:  # whole rows: a fifth of the scatter's time
                self._written[i][0].index_copy_(1, self.slots[0], new[0].to(self._written[i].dtype))
            else:
                index = self.slots[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                self._written[i].scatter_(2, index, new.to(self._written[i].dtype))
        return self._seen[2 * layer], self._seen[2 * layer + 1], self.pos
