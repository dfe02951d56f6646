"""Ours: gists of the three kinds, at the top level that a GistNet file allows for the slots."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.gistnet import GistNet

from ...train.pooled_maker import pool_levels
from ..pasts import Kept, Past, hidden_behind
from . import KeepingRival
from .compressive import span_centres


class PooledGists(KeepingRival):
    """`gist_pool` of the text's own keys and values; the gists of the last of `levels` are kept, with log-weight `bias`
    in attention."""

    ours, anew = True, False

    def __init__(self, name: str, levels: Sequence[GistPoolWeights], bias: float = 0.0) -> None:
        self.name, self.levels, self.size, self.bias = name, levels, levels[0].block_size, bias

    def keep(self, past: Past, slots: int) -> Kept:
        k, v = pool_levels(past.k, past.v, self.levels, self.size)[-1]
        _check(k.shape[3], slots)
        return Kept(k, v, span_centres(past.far, slots, past.ids.device).expand(past.batch, slots), self.bias)


def summaries(past: Past, net: GistNet, size: int, level: int) -> Tensor:
    """Summary vectors of all blocks, [B, far / size**level, E], from the text's embeddings alone."""
    x = past.decoder.embed(past.ids[:, : past.far])
    for at in range(1, level + 1):
        x = net.encode(x.unflatten(1, (-1, size)).flatten(0, 1), level=at).unflatten(0, (past.batch, -1))
    return x


class ProjectedGists(KeepingRival):
    """Keys and values projected from summary vectors: the far text never runs through the base model."""

    ours, anew = True, False

    def __init__(self, name: str, net: GistNet, size: int, level: int = 1) -> None:
        self.name, self.net, self.size, self.level = name, net, size, level

    def keep(self, past: Past, slots: int) -> Kept:
        vectors = summaries(past, self.net, self.size, self.level)
        _check(vectors.shape[1], slots)
        k, v = (x.unflatten(2, (past.batch, -1)).transpose(1, 2) for x in self.net.project(vectors.flatten(0, 1)))
        return Kept(k, v, span_centres(past.far, slots, past.ids.device).expand(past.batch, slots))


class EmbeddingGists:
    """Summary vectors run through the model as input embeddings."""

    anew = False

    def __init__(self, name: str, net: GistNet, size: int, level: int = 1, *, ours: bool = True) -> None:
        self.name, self.net, self.size, self.level, self.ours = name, net, size, level, ours

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        vectors = summaries(past, self.net, self.size, self.level)
        _check(vectors.shape[1], slots)
        position = span_centres(past.far, slots, past.ids.device).expand(past.batch, slots)
        return hidden_behind(past, vectors, position, packed=packed)


def _check(gists: int, slots: int) -> None:
    if gists != slots:
        raise ValueError(f"slots: expected as many as there are gists, {gists}, got {slots}")
