"""Inputs, bytes and FLOPs of `lens_score`, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import SHAPES, LensScoreWeights


@dataclass(frozen=True)
class Case:
    """One shape: N entries of width E, Q queries, F features; the net's sizes as in `LensScoreWeights.init`."""

    name: str
    entries: int
    embed_dim: int
    queries: int = 8
    features: int = 16
    width: int = 512
    n_heads: int = 8
    n_passes: int = 1
    ffn_dim: int = 512
    head_value_dim: int = 8
    n_direct: int = 8
    head_dim: int = 64

    def untrained(self, seed: int = 0) -> LensScoreWeights:
        """Fresh fp32 weights."""
        return LensScoreWeights.init(
            self.embed_dim, self.features, width=self.width, n_heads=self.n_heads, n_passes=self.n_passes,
            ffn_dim=self.ffn_dim, head_value_dim=self.head_value_dim, n_direct=self.n_direct, head_dim=self.head_dim,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def make(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, LensScoreWeights, Tensor]:
        """entries, features, queries, weights as after some training (no zero matrix, gains off one), legal.

        All in `dtype` but the features, which are fp32 (fp64 for fp64).
        """
        gen = torch.Generator().manual_seed(seed + 1)
        weights = self.untrained(seed)
        moved = dict(zip(SHAPES, weights.tensors(), strict=True))
        moved["head_out"] = torch.randn(moved["head_out"].shape, generator=gen) * self.head_dim**-0.5
        for name in ("read_norm", "mlp_norm", "score_norm", "head_bias", "head_out_bias"):
            moved[name] = moved[name] + 0.1 * torch.randn(moved[name].shape, generator=gen)
        entries = 0.12 * torch.randn(self.entries, self.embed_dim, generator=gen)
        queries = 0.12 * torch.randn(self.queries, self.embed_dim, generator=gen)
        features = torch.randn(self.entries, self.features, generator=gen)
        legal = torch.rand(self.entries, 2, generator=gen) < 0.7
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (
            entries.to(device=device, dtype=dtype),
            features.to(device=device, dtype=wide),
            queries.to(device=device, dtype=dtype),
            weights.with_tensors(*moved.values()).to(device, dtype),
            legal.to(device),
        )

    def _head_inputs(self) -> int:
        return self.n_heads * self.head_value_dim + self.n_heads + self.n_direct + self.features

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic of a forward: the entries once per read pass and once for the scores (together they fit no
        cache), everything else once."""
        e, d, f, p = self.embed_dim, self.width, self.ffn_dim, self.n_passes
        passes = p * (2 * d + 2 * d * d + 2 * d * e + 3 * d * f)
        score = d + d * e + d * d + self.n_heads * self.head_value_dim * d + self.n_direct * e
        head = self.head_dim * (self._head_inputs() + 1) + 2 * self.head_dim + 2
        streams = (p + 1) * self.entries * e + self.queries * e
        wide = 8 if dtype == torch.float64 else 4
        return dtype.itemsize * (d * e + passes + score + head + streams) + self.entries * (
            (self.features + 2) * wide + 2
        )

    def flops(self) -> int:
        """Multiply-adds times two of the matrix products of a forward, projections absorbed."""
        e, d, n, q = self.embed_dim, self.width, self.entries, self.queries
        vectors = self.n_heads * q
        streams = n * e * (2 * self.n_passes * vectors + vectors + self.n_direct)
        head = n * (vectors * self.head_value_dim + self.head_dim * (self._head_inputs() + 2))
        per_pass = 2 * d * d + 2 * d * e + 3 * d * self.ffn_dim
        aside = q * (d * e + self.n_passes * per_pass + d * e + d * d + self.n_heads * self.head_value_dim * d)
        return 2 * (streams + head + aside)


_MODELS = {"SmolLM2-135M": 576, "Llama-3.2-1B": 2048, "Llama-3-8B": 4096}

CASES: tuple[Case, ...] = tuple(
    Case(f"{model}/N{n // 1024}k", n, e) for model, e in _MODELS.items() for n in (2048, 8192, 32768)
)
# (name, N, E, Q, F, d, H, P, f, dv, J, hidden): small and odd, for tests.
SMALL: tuple[Case, ...] = (
    Case("small/one-pass", 37, 48, 8, 6, 32, 4, 1, 24, 4, 4, 16),
    Case("small/two-passes", 65, 33, 5, 3, 24, 3, 2, 20, 2, 5, 12),
    Case("small/one-query", 9, 24, 1, 4, 16, 2, 1, 16, 3, 2, 8),
    Case("small/sixteen-queries", 50, 40, 16, 1, 16, 1, 1, 16, 4, 16, 8),
    Case("small/bare-head", 20, 24, 3, 0, 16, 2, 1, 16, 2, 0, 8),
    Case("small/one-entry", 1, 24, 4, 4, 16, 2, 2, 16, 3, 2, 8),
)
EMPTY = Case("empty/no-entries", 0, 24, 4, 4, 16, 2, 1, 16, 3, 2, 8)
