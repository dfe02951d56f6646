"""Pooled gists in training: `gist_pool` of a sequence's own keys and values, `pool<level>/<field>`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mc_kernels import GistPoolWeights, gist_pool
from mc_runtime.config import GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model.decoder import Decoder

from .gist_kinds import GistMaker, LevelGists

POOL_FIELDS = ("w", "b", "m", "c")
# Logit of the children outside a gist's part of the block, at the start: what they weigh is below bf16's rounding.
OUTSIDE = -8.0
# The same where a part is all that a gist may see.
NEVER = -1e4


def parts_of(size: int, parts: int, device: torch.device | None = None) -> Tensor:
    """[parts, size] bool: which children stand outside each part of a block. Raises InputError if parts are uneven."""
    if parts < 1 or size % parts:
        raise InputError(f"gists: expected a number that divides the block size {size}, got {parts}")
    place = torch.arange(size, device=device) // (size // parts)
    return place != torch.arange(parts, device=device)[:, None]


def split_blocks(weights: GistPoolWeights, parts: int, outside: float = NEVER) -> GistPoolWeights:
    """One gist for each part of a block, of what the weights of one gist per block say about that part.

    outside: added to the logits of the other parts; with OUTSIDE, a start from which a gist can learn to look there.
    Untrained weights split so give the mean of each part.
    """
    layers, heads, _, size = weights.b.shape
    away = parts_of(size, parts, weights.b.device) * outside
    w = weights.w.expand(layers, heads, parts, -1).contiguous()
    return GistPoolWeights(w, weights.b + away.to(weights.b), weights.m, weights.c)


def pool_levels(k: Tensor, v: Tensor, levels: Sequence[GistPoolWeights], size: int) -> list[tuple[Tensor, Tensor]]:
    """k, v [L, B, Hkv, N, D] -> keys and values of the gists of each level, [L, B, Hkv, N // size**level * G, D], a
    block's G gists in order. A level pools all the gists of `size` blocks of the level below."""
    out, children = [], size
    for weights in levels:
        layers, batch = k.shape[:2]
        whole = k.shape[3] // children * children

        def blocks(x: Tensor, whole: int = whole, children: int = children) -> Tensor:
            return x[:, :, :, :whole].unflatten(3, (-1, children)).flatten(0, 1)

        k_gist, v_gist = gist_pool(blocks(k), blocks(v), weights)
        k, v = (x.flatten(2, 3).unflatten(0, (layers, batch)) for x in (k_gist, v_gist))
        out.append((k, v))
        children = size * weights.n_gists
    return out


class PooledMaker(GistMaker):
    """weights: of level 1 and upwards; frozen_levels: those that are used but not trained."""

    kind: GistKind = "pooled"

    def __init__(self, weights: Sequence[GistPoolWeights], frozen_levels: Sequence[int] = ()) -> None:
        self.size = weights[0].block_size
        self.gists = tuple(w.n_gists for w in weights)
        for level, (w, below) in enumerate(zip(weights[1:], self.gists, strict=False), start=2):
            if w.block_size != self.size * below:
                raise InputError(f"level {level}: expected {self.size * below} children per gist, got {w.block_size}")
        self.parameters = {
            f"pool{level}/{name}": x.detach().float().clone().requires_grad_(level not in frozen_levels)
            for level, w in enumerate(weights, start=1)
            for name, x in zip(POOL_FIELDS, w.tensors(), strict=True)
        }

    def weights(self, tensors: Mapping[str, Tensor] | None = None) -> list[GistPoolWeights]:
        named = self.parameters if tensors is None else tensors
        levels = range(1, len(self.gists) + 1)
        return [GistPoolWeights(*(named[f"pool{level}/{f}"] for f in POOL_FIELDS)) for level in levels]

    def make(self, decoder: Decoder, ids: Tensor, k: Tensor | None, v: Tensor | None, parts: int) -> list[LevelGists]:
        assert k is not None
        assert v is not None
        levels = self.weights()
        if len(k) < levels[0].layers:
            levels = [GistPoolWeights(*(x[: len(k)] for x in w.tensors())) for w in levels]
        if parts > 1:
            levels = [split_blocks(levels[0], parts)]
        made = pool_levels(k, v, levels, self.size)
        return [
            LevelGists(self.size**level // w.n_gists, kv=kv)
            for level, (w, kv) in enumerate(zip(levels, made, strict=True), start=1)
        ]

    def install(self, net: GistNet, tensors: Mapping[str, Tensor]) -> GistNet:
        """Levels above those here stay, where they pool as many gists as there are now."""
        own = self.weights(tensors)
        above = net.pool_weights[len(own) :]
        if above and above[0].block_size != self.size * own[-1].n_gists:
            above = ()
        return replace(net, pool_weights=(*own, *above), fingerprint="")
