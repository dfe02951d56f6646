"""Inputs, bytes and FLOPs of `collapse_`, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..kv_splice.plan import SplicePlan
from ..splicing import Edit
from . import cases
from .cases import MODELS
from .weights import GistPoolWeights


@dataclass(frozen=True)
class Case:
    """A cache of `length` entries in slots, of which `blocks` blocks of `block_size` are collapsed.

    last: the blocks are the last entries, so that nothing moves; otherwise they are spread over the timeline, and the
        last entries move into what is freed. L layers, batch B, KV heads, head dimension D, G gists a block.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    length: int
    blocks: int = 1
    last: bool = False
    batch: int = 1
    block_size: int = 32
    n_gists: int = 1

    @cached_property
    def plan(self) -> SplicePlan:
        k, n = self.block_size, self.blocks
        step = k if self.last else self.length // (n + 1)
        first = self.length - n * k if self.last else step
        edits = [Edit(first + i * step, k, self.n_gists) for i in range(n)]
        return SplicePlan.from_edits(self.length, edits, capacity=self.length, discipline="slots")

    @property
    def rows(self) -> int:
        return self.layers * self.batch

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Size of the cache that `make` allocates."""
        return 2 * self.rows * self.kv_heads * self.length * self.head_dim * dtype.itemsize

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `collapse_`: k and v are views of one cache [L, 2, B, Hkv, S, D]; weights are no zeros."""
        generator = torch.Generator().manual_seed(seed)
        size = (self.layers, 2, self.batch, self.kv_heads, self.length, self.head_dim)
        cache = torch.empty(size, dtype=dtype)
        for layer in cache:
            layer.copy_(torch.randn(size[1:], generator=generator))
        cache = cache.to(device)
        return {
            "k": cache[:, 0], "v": cache[:, 1], "weights": self.weights(dtype, device, seed),
            "children": self.plan.removed_slots.view(-1, self.block_size),
            "slots": self.plan.insert_slots.view(-1, self.n_gists), "moves": self.plan.segments,
        }  # fmt: skip

    def weights(self, dtype: torch.dtype, device: torch.device | str, seed: int) -> GistPoolWeights:
        return self._pooled.make(dtype, device, seed)[2]

    @property
    def _pooled(self) -> cases.Case:
        """The pooling on its own."""
        return cases.Case(
            self.name, self.layers, self.batch, self.kv_heads, self.blocks, self.block_size, self.head_dim, self.n_gists
        )

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic: that of the pooling (blocks and weights read, gists written), and one read and one write of
        what moves."""
        moved = self.plan.moves.shape[0] * self.rows * self.kv_heads * 2 * self.head_dim * dtype.itemsize
        return self._pooled.bytes(dtype) + 2 * moved

    def flops(self) -> int:
        return self._pooled.flops()


CASES: tuple[Case, ...] = tuple(
    Case(f"{model}/2k/{n}{'-last' if last else ''}", layers, heads, d, 2048, n, last)
    for model, (layers, heads, d) in MODELS.items()
    for n, last in ((1, True), (1, False), (8, False))
)
SMALL: tuple[Case, ...] = (
    Case("small/one", 2, 2, 8, 40, block_size=8),
    Case("small/last", 2, 1, 16, 40, 2, True, block_size=8),
    Case("small/gists", 3, 2, 5, 61, 3, batch=2, block_size=7, n_gists=3),
    Case("small/many", 1, 1, 20, 400, 29, block_size=9),
    Case("small/heads", 2, 3, 64, 131, 2, batch=2),
)
EMPTY: tuple[Case, ...] = (Case("empty/no-blocks", 2, 2, 8, 9, 0), Case("empty/no-batch", 2, 1, 8, 90, batch=0))
