"""The three kinds of gist behind one interface: what of a tree node enters the cache.

`pooled`     the node's own pooled keys and values, stored in the tree;
`projected`  keys and values of all layers projected from the node's summary vector;
`embedding`  the summary vector, run through the model like an input embedding.

A node that was ingested fast has no pooled keys and values. A `pooled` reader projects those, and only those, if the
projector is trained; an untrained one breaks the model (its answers turn to commas), so their vectors are run as input
embeddings until then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import GistKind
from .gistnet import GistNet, LayerProjector
from .model import Decoder
from .tree import NodeFlag, Tree


@dataclass(frozen=True)
class GistEntries:
    """What M nodes bring into the cache.

    k, v: [L, Hkv, M, D], keys unrotated, in the model's dtype.
    embeddings: [M, E], rows that have to be run through the model where `needs_forward [M]` (their k, v are zeros).
    """

    k: Tensor
    v: Tensor
    embeddings: Tensor
    needs_forward: NDArray[np.bool_]


class GistReader(Protocol):
    """Reads nodes of a tree for the cache. levels, index: [M], levels >= 1."""

    def read(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> GistEntries: ...

    def runs(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[M]: which nodes are run through the model, so that a recomputation has to run them again."""
        ...


class _Reader:
    def __init__(self, decoder: Decoder, net: GistNet) -> None:
        self.decoder, self.net = decoder, net

    def _empty(self, count: int, *, forward: bool) -> GistEntries:
        c = self.decoder.config
        zeros = torch.zeros(
            c.n_layers, c.n_kv_heads, count, c.head_dim, dtype=self.decoder.dtype, device=self.decoder.device
        )
        rows = torch.zeros(count, c.embed_dim, dtype=self.decoder.dtype, device=self.decoder.device)
        return GistEntries(zeros, zeros.clone(), rows, np.full(count, forward))

    def _summaries(self, tree: Tree, level: int, index: NDArray[np.int64]) -> Tensor:
        rows = tree.summaries(level)[torch.from_numpy(index)]
        return rows.to(self.decoder.device, self.decoder.dtype)

    def _put(self, out: GistEntries, where: NDArray[np.bool_], k: Tensor, v: Tensor) -> None:
        at = torch.from_numpy(where.nonzero()[0]).to(out.k.device)
        out.k.index_copy_(2, at, k.to(out.k))
        out.v.index_copy_(2, at, v.to(out.v))


class ProjectedReader(_Reader):
    """Gists of kind `projected`."""

    def runs(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.zeros(len(levels), np.bool_)

    def read(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> GistEntries:
        out = self._empty(len(levels), forward=False)
        for level in np.unique(levels):
            where = levels == level
            self._put(out, where, *self.net.project(self._summaries(tree, int(level), index[where])))
        return out


class PooledReader(_Reader):
    """Gists of kind `pooled`; nodes without stored keys and values are projected, or run while that is untrained."""

    def _stored(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> NDArray[np.bool_]:
        stored = np.zeros(len(levels), np.bool_)
        for level in np.unique(levels):
            where = levels == level
            stored[where] = (tree.flags_at(int(level), index[where]) & NodeFlag.KV) != 0
        return stored

    def runs(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> NDArray[np.bool_]:
        return ~self._stored(tree, levels, index) & isinstance(self.net.projector, LayerProjector)

    def read(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> GistEntries:
        out, stored = self._empty(len(levels), forward=False), self._stored(tree, levels, index)
        for level in np.unique(levels):
            where = levels == level
            pooled, missing = where & stored, where & ~stored
            if pooled.any():
                k, v = tree.kv(int(level), index[pooled])  # [m, L, Hkv, D]
                self._put(out, pooled, k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3))
            if missing.any():
                rows = self._summaries(tree, int(level), index[missing])
                if isinstance(self.net.projector, LayerProjector):
                    out.embeddings[torch.from_numpy(missing.nonzero()[0])] = rows
                    out.needs_forward[missing] = True
                else:
                    self._put(out, missing, *self.net.project(rows))
        return out


class EmbeddingReader(_Reader):
    """Gists of kind `embedding`."""

    def runs(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.ones(len(levels), np.bool_)

    def read(self, tree: Tree, levels: NDArray[np.int8], index: NDArray[np.int64]) -> GistEntries:
        out = self._empty(len(levels), forward=True)
        for level in np.unique(levels):
            at = torch.from_numpy((levels == level).nonzero()[0])
            out.embeddings[at] = self._summaries(tree, int(level), index[levels == level])
        return out


READERS: dict[GistKind, type[PooledReader] | type[ProjectedReader] | type[EmbeddingReader]] = {
    "pooled": PooledReader,
    "projected": ProjectedReader,
    "embedding": EmbeddingReader,
}


def gist_reader(kind: GistKind, decoder: Decoder, net: GistNet) -> GistReader:
    return READERS[kind](decoder, net)
