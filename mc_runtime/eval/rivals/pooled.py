"""Ours, and its untrained start (the mean of keys and values: Compressive Transformer, Rae et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mc_kernels import GistPoolWeights

from ...train.gist_task import pool_levels
from ..pasts import Kept, Past


class Pooled:
    """Gists of the top level of `levels`: far / K**level of them must be the slots asked for."""

    def __init__(self, name: str, levels: Sequence[GistPoolWeights]) -> None:
        self.name, self.levels = name, levels
        self.size = levels[0].b.shape[-1]

    def keep(self, past: Past, slots: int) -> Kept:
        span = self.size ** len(self.levels)
        if past.far != slots * span:
            raise ValueError(f"slots: expected {past.far // span} gists of {span} tokens, got {slots}")
        k, v = pool_levels(past.k, past.v, self.levels, self.size)[-1]
        position = torch.arange(slots, device=past.ids.device) * span + (span - 1) // 2
        return Kept(k, v, position.expand(past.batch, slots))


def mean_pooling(layers: int, kv_heads: int, head_dim: int, size: int, levels: int = 1) -> Pooled:
    weights = GistPoolWeights.zeros(layers, kv_heads, 1, size, head_dim)
    return Pooled("mean of K/V (Compressive)", [weights] * levels)
