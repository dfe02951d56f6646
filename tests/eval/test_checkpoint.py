"""The shipped weights belong to the default model and do more than average."""

from __future__ import annotations

import pytest
import torch

import mc_runtime
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel, load_model
from mc_runtime.model.resolve import PACKAGED
from mc_runtime.shipped import CHECKPOINTS, SHIPPED, gistnet_file, lensnet_file


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    try:
        return load_model("smollm2-135m")
    except mc_runtime.MegaContextError as error:
        pytest.skip(f"the default model is not here: {error}")


def test_shipped_gists(model: LoadedModel) -> None:
    assert "smollm2-135m" in PACKAGED
    file = gistnet_file(SHIPPED, model.fingerprint, 32)
    assert file is not None
    trained, plain = GistNet.load(file, model.decoder, 32), GistNet.untrained(model.decoder, 32)
    assert len(trained.pool_weights) == 2
    c = model.config
    k, v = torch.randn(2, c.n_layers, c.n_kv_heads, 4, 32, c.head_dim, generator=torch.Generator().manual_seed(0))
    for level in (1, 2):
        for x, mean in zip(trained.pool(k, v, level=level), plain.pool(k, v, level=level), strict=True):
            assert x.isfinite().all()
            assert not torch.allclose(x, mean, atol=0.05)


def test_shipped_lensnet(model: LoadedModel) -> None:
    net = LensNet.load(lensnet_file(None, model.fingerprint), model.decoder)
    assert bool(net.weights.head_out.any()), "an untrained net scores nothing"


def test_the_default_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINTS.glob("smollm2-135m-*.safetensors")) <= 12e6
