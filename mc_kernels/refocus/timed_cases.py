"""Inputs, bytes and FLOPs of `refocus_` for benchmarks: a long context of which a few places change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..gist_pool import cases
from ..gist_pool.cases import MODELS
from ..kv_splice.plan import SplicePlan
from ..splicing import Edit
from .state import GistStore, RefocusLists, RefocusRule, RefocusState, node_key

WORTH, CHEAP, DEAR = 1.0, 0.01, 5.0  # nats: of opening what opens; of keeping open what closes, and all else
SPARE = 64  # slots beyond the entries
ARRAY_BYTES = 32  # an entry's level, index, slot, cycle and scores


@dataclass(frozen=True)
class Case:
    """`blocks` blocks of tokens behind `gists` gists of level 1. Spread over them, `opens` gists open and `closes`
    blocks close, as many as the budget asks for. L layers, KV heads, head dimension D, K children a gist."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    gists: int
    blocks: int
    opens: int = 4
    closes: int = 8
    block_size: int = 32

    @property
    def entries(self) -> int:
        return self.gists + self.blocks * self.block_size

    @property
    def opening(self) -> list[int]:
        """Ranks of the gists that open, which are their indices too."""
        return [(i + 1) * self.gists // (self.opens + 1) for i in range(self.opens)]

    @property
    def closing(self) -> list[int]:
        """Ranks at which the blocks begin that close."""
        which = [(i + 1) * self.blocks // (self.closes + 1) for i in range(self.closes)]
        return [self.gists + block * self.block_size for block in which]

    @cached_property
    def plan(self) -> SplicePlan:
        k = self.block_size
        edits = [Edit(r, 1, k) for r in self.opening] + [Edit(r, k, 1) for r in self.closing]
        return SplicePlan.from_edits(self.entries, edits, capacity=self.entries + SPARE, discipline="slots")

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of `refocus_`, all of them but `backend`. k and v are views of one cache [L, 2, Hkv, S, D];
        weights are no zeros."""
        generator, k = torch.Generator().manual_seed(seed), self.block_size
        slots, device = self.entries + SPARE, torch.device(device)

        def normal(rows: int) -> torch.Tensor:
            size = (self.layers, 2, self.kv_heads, rows, self.head_dim)
            out = torch.empty(size, dtype=dtype)
            for layer in out:
                layer.copy_(torch.randn(size[1:], generator=generator))
            return out.to(device)

        cache, store = normal(slots), normal(self.opens * k)
        tokens = range(self.gists * k, self.gists * k + self.blocks * k)
        levels = [1] * self.gists + [0] * len(tokens)
        scores = torch.tensor([[0.0, DEAR]]).repeat(slots, 1)
        scores[self.opening, 0] = WORTH
        scores[self.closing, 1] = CHEAP
        n_nodes = self.gists + self.blocks
        return {
            "k": cache[:, 0], "v": cache[:, 1],
            "state": RefocusState.of(levels, [*range(self.gists), *tokens], slots, gist_bias=-1.0, device=device),
            "scores": scores.to(device),
            "store": GistStore(
                store[:, 0], store[:, 1],
                torch.tensor([node_key(1, i, k) for i in self.opening], dtype=torch.int64, device=device),
                torch.arange(0, self.opens * k, k, dtype=torch.int32, device=device),
            ),
            "counts": torch.tensor([n_nodes * k, n_nodes], device=device),
            "pinned": torch.tensor([[0, 1], [(n_nodes - 1) * k, n_nodes * k]], device=device),
            "weights": [self._pooled.make(dtype, device, seed)[2]],
            "rule": RefocusRule(k, self.plan.new_length, gist_bias=-1.0),
            "lists": RefocusLists.allocate(slots, slots, device),
        }  # fmt: skip

    @property
    def _pooled(self) -> cases.Case:
        """The pooling on its own."""
        return cases.Case(self.name, self.layers, 1, self.kv_heads, self.closes, self.block_size, self.head_dim)

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Size of the cache that `make` allocates."""
        return (self.entries + SPARE) * self._entry_bytes(dtype)

    def _entry_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic: that of the pooling (blocks and weights read, gists written), one read and one write of what
        opens and of what moves, and one of the arrays."""
        carried = self.opens * self.block_size + self.plan.moves.shape[0]
        return self._pooled.bytes(dtype) + 2 * carried * self._entry_bytes(dtype) + 2 * ARRAY_BYTES * self.entries

    def flops(self) -> int:
        return self._pooled.flops()


CASES: tuple[Case, ...] = tuple(
    Case(f"{model}/{name}/4-open-8-close", layers, heads, d, gists, blocks)
    for model, (layers, heads, d) in MODELS.items()
    for name, gists, blocks in (("2k", 512, 48), ("8k", 2048, 192))
)
