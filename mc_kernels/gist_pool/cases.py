"""Inputs, bytes and FLOPs of `gist_pool`, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import GistPoolWeights


@dataclass(frozen=True)
class Case:
    """One shape: layers L, batch B (R = L x B), KV heads, N blocks of K entries, head dimension D, G gists a block."""

    name: str
    layers: int
    batch: int
    kv_heads: int
    blocks: int
    block_size: int
    head_dim: int
    n_gists: int = 1

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, GistPoolWeights]:
        """k, v (strided views into one cache [L, 2, B, Hkv, S, D]) and weights that are no zeros, all in `dtype`."""
        gen = torch.Generator().manual_seed(seed)
        slots = self.blocks * self.block_size
        cache = torch.randn(self.layers, 2, self.batch, self.kv_heads, slots, self.head_dim, generator=gen)
        cache = cache.to(device=device, dtype=dtype)

        def rows(part: int) -> Tensor:
            x = cache[:, part].unflatten(3, (self.blocks, self.block_size))
            # [L, B, ...] with the stride of a [L, 2, B, ...] cache is one row dimension only at B = 1.
            return x.squeeze(1) if self.batch == 1 else x.flatten(0, 1)

        zeros = GistPoolWeights.zeros(self.layers, self.kv_heads, self.n_gists, self.block_size, self.head_dim)
        scales = (0.2, 0.3, 0.1 / self.head_dim**0.5, 0.05)
        drawn = (torch.randn(x.shape, generator=gen) * s for x, s in zip(zeros.tensors(), scales, strict=True))
        return rows(0), rows(1), GistPoolWeights(*drawn).to(device=device, dtype=dtype)

    def _outputs(self) -> int:
        return self.layers * self.batch * self.kv_heads * self.blocks * self.n_gists

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic of a forward: one read of k, v and the weights, one write of the gists."""
        d2 = 2 * self.head_dim
        entries = self.layers * self.batch * self.kv_heads * self.blocks * self.block_size
        weights = self.layers * self.kv_heads * (self.n_gists * (d2 + self.block_size) + d2 * d2 + d2)
        return dtype.itemsize * (entries * d2 + weights + self._outputs() * d2)

    def flops(self) -> int:
        """Multiply-adds of a forward times two: the norm, the logits, the pooling, the linear residual."""
        d2 = 2 * self.head_dim
        pooled = self._outputs() * (2 * self.block_size * d2 * 2 + 2 * d2 * d2)
        norms = self.layers * self.batch * self.kv_heads * self.blocks * self.block_size * d2 * 2
        return pooled + norms


MODELS = {"SmolLM2-135M": (30, 3, 64), "Llama-3.2-1B": (16, 8, 64), "Llama-3-8B": (32, 8, 128)}

CASES: tuple[Case, ...] = tuple(
    Case(f"{model}/N{n}", layers, 1, heads, n, 32, d) for model, (layers, heads, d) in MODELS.items() for n in (1, 256)
)
# (name, L, B, Hkv, N, K, D, G): small, odd and empty, for tests.
SMALL: tuple[Case, ...] = (
    Case("small/one-block", 3, 1, 2, 1, 32, 16),
    Case("small/batch", 2, 3, 2, 3, 32, 8),
    Case("small/gists", 2, 2, 1, 3, 16, 8, 3),
    Case("small/odd", 3, 1, 3, 5, 7, 5, 2),
    *(Case(f"small/K{k}", 2, 1, 2, 2, k, 8) for k in (8, 16, 64, 128)),
    Case("small/single-child", 2, 1, 1, 2, 1, 4),
)
EMPTY: tuple[Case, ...] = (
    Case("empty/no-blocks", 2, 1, 2, 0, 32, 8),
    Case("empty/no-batch", 2, 0, 2, 3, 32, 8),
)
