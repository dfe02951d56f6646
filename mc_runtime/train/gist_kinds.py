"""How gists of each kind are made of a sequence while they are trained, and the parameters that make them.

`pooled`     `gist_pool` of the sequence's own keys and values: `pool<level>/<field>`;
`projected`  keys and values projected from GistNet's vector: `encode/<field>` and `project/<field>`;
`embedding`  GistNet's vector, which the model then reads as an input: `encode/<field>`.

Parameters are fp32 masters. The kernels take them beside bf16 data and accumulate in fp32; what they give has the
model's dtype. Vectors of level 2 come from the same net by its level embedding; one projector serves all levels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mc_runtime.config import GistKind
from mc_runtime.gistnet import GistNet
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.stores import ConcatStore


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
