"""The shipped weights belong to the default model and do more than average."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mc_runtime
from mc_runtime.gistnet import GistNet
from mc_runtime.model import load_model
from mc_runtime.model.resolve import PACKAGED

CHECKPOINT = Path(mc_runtime.__file__).parent / "checkpoints" / "smollm2-135m-gist.safetensors"


def test_shipped_gists() -> None:
    try:
        model = load_model("smollm2-135m")
    except mc_runtime.MegaContextError as error:
        pytest.skip(f"the default model is not here: {error}")
    assert "smollm2-135m" in PACKAGED
    trained, plain = GistNet.load(CHECKPOINT, model.decoder, 32), GistNet.untrained(model.decoder, 32)
    c = model.config
    k, v = torch.randn(2, c.n_layers, c.n_kv_heads, 4, 32, c.head_dim, generator=torch.Generator().manual_seed(0))
    for x, mean in zip(trained.pool(k, v), plain.pool(k, v), strict=True):
        assert x.isfinite().all()
        assert not torch.allclose(x, mean, atol=0.05)
