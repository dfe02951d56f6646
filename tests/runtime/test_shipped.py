"""Which weights a choice means."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from mc_kernels import GistPoolWeights
from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.shipped import CHECKPOINTS, FILES, gistnet_file, lensnet_file

OPTIONS = {"budget": 256, "block_size": 8, "recent_tokens": 32, "ingest_chunk": 128, "ingest_window": 128}


def test_files_of_every_model_are_there() -> None:
    for files in FILES.values():
        for name in files:
            assert name is None or (CHECKPOINTS / name).is_file()


def test_a_choice_of_gists() -> None:
    known = next(iter(FILES))
    assert gistnet_file("shipped", known, 32) == CHECKPOINTS / FILES[known][0]
    assert gistnet_file(Path("shipped"), known, 32) == CHECKPOINTS / FILES[known][0], "as the command line gives it"
    assert gistnet_file("shipped", known, 16) is None
    assert gistnet_file("shipped", "another model", 32) is None
    assert gistnet_file("untrained", known, 32) is None
    assert gistnet_file(None, known, 32) is None
    assert gistnet_file("a/file.safetensors", known, 32) == Path("a/file.safetensors")


def test_lensnet_is_named_or_shipped() -> None:
    assert lensnet_file("mine.safetensors", "another model") == Path("mine.safetensors")
    with pytest.raises(InputError, match="no weights for this model"):
        lensnet_file(None, "another model")


def test_a_model_without_shipped_weights_has_untrained_gists(tmp_path: Path) -> None:
    model = tiny_model()
    with Session.open(tmp_path / "a", model, gistnet="shipped", **OPTIONS) as session:
        shipped = session.tree.spec.gistnet
    with Session.open(tmp_path / "b", model, gistnet="untrained", **OPTIONS) as session:
        assert session.tree.spec.gistnet == shipped


def test_levels_above_the_trained_ones_are_means() -> None:
    """Weights of a level that is applied to the next see what they were not trained for."""
    model = tiny_model()
    net, generator = GistNet.untrained(model.decoder, 8), torch.Generator().manual_seed(0)
    trained = net.pool_weights[0].state_dict()
    trained = GistPoolWeights(*(torch.randn(x.shape, generator=generator) for x in trained.values()))
    net = replace(net, pool_weights=(trained,))
    c = model.config
    k, v = torch.randn(2, c.n_layers, c.n_kv_heads, 2, 8, c.head_dim, generator=generator)
    for x, gist, mean in zip((k, v), net.pool(k, v, level=1), net.pool(k, v, level=2), strict=True):
        torch.testing.assert_close(mean, x.mean(3))
        assert not torch.allclose(gist, mean, atol=0.1)
