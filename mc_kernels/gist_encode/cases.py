"""Inputs, bytes and FLOPs of `gist_encode`, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import SHAPES, GistEncodeWeights


@dataclass(frozen=True)
class Case:
    """One shape: N blocks of K embeddings of width E, a net of `layers` layers of width Eg, feed-forward width F."""

    name: str
    blocks: int
    block_size: int
    embed_dim: int
    width: int = 512
    layers: int = 2
    n_heads: int = 8
    ffn_dim: int = 1792
    n_gists: int = 1
    pool: str = "softmax"
    level: int = 1
    n_levels: int = 4
    target_rms: float = 0.12

    def untrained(self, seed: int = 0) -> GistEncodeWeights:
        """Fresh fp32 weights with a `mu` of the size of the embeddings' common component."""
        gen = torch.Generator().manual_seed(seed)
        return GistEncodeWeights.init(
            self.embed_dim, self.width, self.layers, self.n_heads, self.ffn_dim,
            n_gists=self.n_gists, n_levels=self.n_levels, target_rms=self.target_rms, pool=self.pool,
            mu=0.1 * torch.randn(self.embed_dim, generator=gen), generator=gen,
        )  # fmt: skip

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, GistEncodeWeights]:
        """blocks [N, K, E] and weights as after some training (no zero matrix, gains off one), all in `dtype`."""
        gen = torch.Generator().manual_seed(seed + 1)
        weights = self.untrained(seed)
        moved = dict(zip(SHAPES, weights.tensors(), strict=True))
        moved["w_out"] = torch.randn(moved["w_out"].shape, generator=gen) * self.target_rms / self.width**0.5
        for name in ("attn_norm", "ffn_norm", "final_norm", "gain"):
            moved[name] = moved[name] + 0.1 * torch.randn(moved[name].shape, generator=gen)
        blocks = self.target_rms * torch.randn(self.blocks, self.block_size, self.embed_dim, generator=gen)
        if self.level == 1:
            blocks += moved["mu"]
        trained = weights.with_tensors(*moved.values()).to(device, dtype)
        return blocks.to(device=device, dtype=dtype), trained

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic of a forward: one read of the blocks and the weights, one write of the gists."""
        e, eg, f = self.embed_dim, self.width, self.ffn_dim
        per_layer = 2 * eg + 4 * eg * eg + 3 * eg * f
        weights = e + 2 * e * eg + self.n_levels * eg + self.layers * per_layer + eg + self.n_gists * eg + 1
        return dtype.itemsize * (weights + self.blocks * (self.block_size + self.n_gists) * e)

    def flops(self) -> int:
        """Multiply-adds times two of the matrix products of a forward."""
        e, eg, f, k = self.embed_dim, self.width, self.ffn_dim, self.block_size
        rows = k + (self.pool == "cls")
        per_layer = rows * (4 * eg * eg + 3 * eg * f) + 2 * rows * rows * eg
        pooling = 2 * self.n_gists * k * eg if self.pool == "softmax" else 0
        return 2 * self.blocks * (k * e * eg + self.layers * per_layer + pooling + self.n_gists * e * eg)


_MODELS = {"SmolLM2-135M": 576, "Llama-3.2-1B": 2048, "Llama-3-8B": 4096}

CASES: tuple[Case, ...] = tuple(
    Case(f"{model}/N{n}", n, 32, e) for model, e in _MODELS.items() for n in (1, 8, 64, 512, 4096)
)
# (name, N, K, E, Eg, layers, heads, F, G, pool, level): small, odd and empty, for tests.
SMALL: tuple[Case, ...] = (
    Case("small/one", 1, 32, 48, 32, 2, 4, 56),
    Case("small/gists", 3, 16, 40, 32, 2, 2, 48, 3),
    Case("small/odd", 5, 7, 33, 20, 1, 2, 27, 2, "softmax", 2),
    Case("small/mean", 3, 8, 24, 16, 2, 2, 24, 1, "mean"),
    Case("small/cls", 3, 8, 24, 16, 2, 2, 24, 1, "cls", 3),
    Case("small/no-layers", 2, 8, 24, 16, 0, 1, 24),
    *(Case(f"small/K{k}", 2, k, 24, 16, 1, 2, 24) for k in (8, 16, 64, 128)),
    Case("small/single-child", 2, 1, 24, 16, 1, 2, 24),
)
EMPTY = Case("empty/no-blocks", 0, 32, 24, 16, 1, 2, 24, 2)
