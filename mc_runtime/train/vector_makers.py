"""Gists of GistNet's vectors in training: `embedding`, `encode/<field>`, which the model reads as an input, and
`projected`, `project/<field>` beside them: keys and values projected from the vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from mc_kernels import GistEncodeWeights, gist_encode
from mc_kernels.gist_encode.weights import SHAPES
from mc_runtime.config import GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model.decoder import Decoder

from .block_inputs import BlockInputs, encode_with_left_context
from .gist_kinds import GistMaker, LevelGists

PROJECT_FIELDS = ("down", "up", "bias")


class EmbeddingMaker(GistMaker):
    """weights: GistNet; levels: how many of its levels are used. trained=False: its vectors are kept as they are.

    inputs, left_context: what blocks of level 1 are read from (see `block_inputs`). Raises InputError.
    """

    kind: GistKind = "embedding"

    def __init__(
        self,
        weights: GistEncodeWeights,
        size: int,
        levels: int = 1,
        *,
        trained: bool = True,
        inputs: BlockInputs | None = None,
        left_context: bool = False,
    ) -> None:
        if weights.n_gists != 1:
            raise InputError(f"gists: expected one vector per block, got {weights.n_gists}")
        if size > weights.max_block_size:
            raise InputError(f"block size: expected at most {weights.max_block_size} for these weights, got {size}")
        if left_context and weights.pool == "cls":
            raise InputError("left_context: expected pool softmax or mean, got 'cls'")
        self.size, self.gists = size, (1,) * levels
        self.inputs, self.left_context = inputs or BlockInputs(), left_context
        self._like = weights
        self.parameters = {
            f"encode/{name}": x.detach().float().clone().requires_grad_(trained and name != "mu")
            for name, x in zip(SHAPES, weights.tensors(), strict=True)
        }

    def encode_weights(self, tensors: Mapping[str, Tensor] | None = None) -> GistEncodeWeights:
        named = self.parameters if tensors is None else tensors
        return self._like.with_tensors(*(named[f"encode/{name}"] for name in SHAPES))

    def vectors(self, rows: Tensor, parts: int = 1) -> list[Tensor]:
        """Inputs of tokens [B, N, E] -> vectors [B, N // size**level * parts, E] of each level."""
        weights, batch, out = self.encode_weights(), len(rows), []
        for level in range(1, 2 if parts > 1 else len(self.gists) + 1):
            whole = rows.shape[1] // self.size * self.size
            blocks = rows[:, :whole].unflatten(1, (-1, self.size // parts))
            if self.left_context and level == 1:
                rows = encode_with_left_context(blocks, weights)
            else:
                rows = gist_encode(blocks.flatten(0, 1), weights, level=level)[:, 0].unflatten(0, (batch, -1))
            out.append(rows)
        return out

    def make(self, decoder: Decoder, ids: Tensor, k: Tensor | None, v: Tensor | None, parts: int) -> list[LevelGists]:
        made = self.vectors(self.inputs.rows(decoder, ids), parts)
        return [LevelGists(self.size**level // parts, vectors=x) for level, x in enumerate(made, start=1)]

    def install(self, net: GistNet, tensors: Mapping[str, Tensor]) -> GistNet:
        if self.inputs.layers or self.left_context:
            raise InputError("a memory's GistNet reads the embeddings of a block alone: expected no other inputs")
        return replace(net, encode_weights=self.encode_weights(tensors), fingerprint="")


class ProjectedMaker(EmbeddingMaker):
    """The vectors and their projection to keys and values of all layers."""

    kind: GistKind = "projected"

    def __init__(
        self,
        weights: GistEncodeWeights,
        projector: Projector,
        size: int,
        levels: int = 1,
        *,
        trained: bool = True,
        inputs: BlockInputs | None = None,
        left_context: bool = False,
    ) -> None:
        super().__init__(weights, size, levels, trained=trained, inputs=inputs, left_context=left_context)
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
