"""What an untrained GistNet takes from a model's embeddings."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from mc_runtime.gistnet import GistNet, row_statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 4096, 10_000])
def test_statistics_of_rows(count: int, dtype: torch.dtype) -> None:
    rows = (3.0 + torch.randn(count, 24, generator=torch.Generator().manual_seed(count))).to(dtype)
    mean, rms = row_statistics(rows)
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, rows.double().mean(0).float(), rtol=1e-6, atol=1e-6)
    assert rms == pytest.approx(float(rows.double().square().mean().sqrt()), rel=1e-7)


def test_an_untrained_net_centres_by_them() -> None:
    decoder = tiny_model().decoder
    weights = GistNet.untrained(decoder, 8).encode_weights
    mean, rms = row_statistics(decoder.embedding)
    assert torch.equal(weights.mu, mean)
    assert weights.target_rms == rms
