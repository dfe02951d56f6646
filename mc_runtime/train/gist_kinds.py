"""How gists of each kind are made of a sequence while they are trained, and the parameters that make them.

`pooled`     `gist_pool` of the sequence's own keys and values: `pool<level>/<field>`;
`projected`  keys and values projected from GistNet's vector: `encode/<field>` and `project/<field>`;
`embedding`  GistNet's vector, which the model then reads as an input: `encode/<field>`.

Parameters are fp32 masters. The kernels take them beside bf16 data and accumulate in fp32; what they give has the
model's dtype. Vectors of level 2 come from the same net by its level embedding; one projector serves all levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mc_kernels import GistEncodeWeights, GistPoolWeights, gist_encode, gist_pool
from mc_kernels.gist_encode.weights import SHAPES
from mc_runtime.config import GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore

POOL_FIELDS = ("w", "b", "m", "c")
PROJECT_FIELDS = ("down", "up", "bias")
# Logit of the children outside a gist's part of the block, at the start: what they weigh is below bf16's rounding.
OUTSIDE = -8.0
# The same where a part is all that a gist may see.
NEVER = -1e4


@dataclass(frozen=True, eq=False)
class LevelGists:
    """The gists of one level of B sequences, in the order of the text; span: tokens that each stands for.

    kv: keys (unrotated) and values [L, B, Hkv, M, D]; None if the model has to read `vectors` to make them.
    vectors: [B, M, E] in embedding space; None if the gists have none.
    """

    span: int
    kv: tuple[Tensor, Tensor] | None = None
    vectors: Tensor | None = None

    def neighbours(self) -> Tensor:
        """What a gist says, for comparing it with the next one: [..., M, F]."""
        if self.vectors is not None:
            return self.vectors
        assert self.kv is not None
        return torch.cat(self.kv, dim=-1)

    def features(self) -> Tensor:
        """All that a gist says, each head's key and value at RMS 1: [B, M, F] fp32."""
        if self.vectors is not None:
            return _unit(self.vectors)
        assert self.kv is not None
        x = _unit(torch.stack(self.kv))  # [2, L, B, Hkv, M, D]
        return x.permute(2, 4, 1, 0, 3, 5).flatten(2)


def _unit(x: Tensor) -> Tensor:
    x = x.float()
    return x * (x.square().mean(-1, keepdim=True) + 1e-12).rsqrt()


@torch.no_grad()
def read_text(decoder: Decoder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, N] int64 -> keys (unrotated) and values [L, B, Hkv, N, D], each row read from its own beginning."""
    store = ConcatStore()
    decoder(decoder.embed(ids), torch.arange(ids.shape[1], device=ids.device).expand(ids.shape), store)
    return store.keys, store.values


class GistMaker(ABC):
    """Makes gists. size: tokens per block, K. gists: per block, by level. parameters: by name, fp32 leaves."""

    kind: GistKind
    size: int
    gists: tuple[int, ...]
    parameters: dict[str, Tensor]

    @abstractmethod
    def make(self, decoder: Decoder, ids: Tensor, k: Tensor | None, v: Tensor | None, parts: int) -> list[LevelGists]:
        """Gists of each level of sequences ids [B, N], of which k, v [L, B, Hkv, N, D] are what the first L layers made
        (None where `kind` is `embedding`). parts > 1: one gist for each of so many parts of a block, level 1 alone."""

    @abstractmethod
    def install(self, net: GistNet, tensors: Mapping[str, Tensor]) -> GistNet:
        """`net` with the parts that are trained here; `tensors` as `parameters`, other names are ignored."""


# ---- pooled ----


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


# ---- GistNet's vectors ----


class EmbeddingMaker(GistMaker):
    """weights: GistNet; levels: how many of its levels are used. trained=False: its vectors are kept as they are."""

    kind: GistKind = "embedding"

    def __init__(self, weights: GistEncodeWeights, size: int, levels: int = 1, *, trained: bool = True) -> None:
        if weights.n_gists != 1:
            raise InputError(f"gists: expected one vector per block, got {weights.n_gists}")
        if size > weights.max_block_size:
            raise InputError(f"block size: expected at most {weights.max_block_size} for these weights, got {size}")
        self.size, self.gists = size, (1,) * levels
        self._like = weights
        self.parameters = {
            f"encode/{name}": x.detach().float().clone().requires_grad_(trained and name != "mu")
            for name, x in zip(SHAPES, weights.tensors(), strict=True)
        }

    def encode_weights(self, tensors: Mapping[str, Tensor] | None = None) -> GistEncodeWeights:
        named = self.parameters if tensors is None else tensors
        return self._like.with_tensors(*(named[f"encode/{name}"] for name in SHAPES))

    def vectors(self, rows: Tensor, parts: int = 1) -> list[Tensor]:
        """Token embeddings [B, N, E] -> vectors [B, N // size**level * parts, E] of each level."""
        weights, batch, out = self.encode_weights(), len(rows), []
        for level in range(1, 2 if parts > 1 else len(self.gists) + 1):
            whole = rows.shape[1] // self.size * self.size
            blocks = rows[:, :whole].unflatten(1, (-1, self.size // parts)).flatten(0, 1)
            rows = gist_encode(blocks, weights, level=level)[:, 0].unflatten(0, (batch, -1))
            out.append(rows)
        return out

    def make(self, decoder: Decoder, ids: Tensor, k: Tensor | None, v: Tensor | None, parts: int) -> list[LevelGists]:
        made = self.vectors(decoder.embed(ids), parts)
        return [LevelGists(self.size**level // parts, vectors=x) for level, x in enumerate(made, start=1)]

    def install(self, net: GistNet, tensors: Mapping[str, Tensor]) -> GistNet:
        return replace(net, encode_weights=self.encode_weights(tensors), fingerprint="")


class ProjectedMaker(EmbeddingMaker):
    """The vectors and their projection to keys and values of all layers."""

    kind: GistKind = "projected"

    def __init__(
        self, weights: GistEncodeWeights, projector: Projector, size: int, levels: int = 1, *, trained: bool = True
    ) -> None:
        super().__init__(weights, size, levels, trained=trained)
        for name in PROJECT_FIELDS:
            x: Tensor = getattr(projector, name)
            self.parameters[f"project/{name}"] = x.detach().float().clone().requires_grad_()

    def projector(self, tensors: Mapping[str, Tensor] | None = None) -> Projector:
        named = self.parameters if tensors is None else tensors
        return Projector(*(named[f"project/{name}"] for name in PROJECT_FIELDS))

    def make(self, decoder: Decoder, ids: Tensor, k: Tensor | None, v: Tensor | None, parts: int) -> list[LevelGists]:
        assert k is not None
        whole, batch, out = self.projector(), len(ids), []
        project = Projector(whole.down, whole.up[: len(k)], whole.bias[: len(k)])
        for gists in super().make(decoder, ids, k, v, parts):
            assert gists.vectors is not None
            made = project(gists.vectors.flatten(0, 1))
            keys, values = (x.to(k).unflatten(2, (batch, -1)).transpose(1, 2) for x in made)
            out.append(replace(gists, kv=(keys, values)))
        return out

    def install(self, net: GistNet, tensors: Mapping[str, Tensor]) -> GistNet:
        return replace(super().install(net, tensors), projector=self.projector(tensors))
