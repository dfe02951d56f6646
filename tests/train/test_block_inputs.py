"""What GistNet reads in an ablation: hidden states of the first layers, and the block before."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gist_makers import K, text
from torch import Tensor

from mc_kernels import GistEncodeWeights, gist_encode
from mc_kernels.gist_encode.ref import _layer, unit_rms
from mc_kernels.rope import phases
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.block_inputs import BlockInputs, encode_with_left_context
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_start import GistSettings, make_task
from mc_runtime.train.vector_makers import EmbeddingMaker

NARROW: dict[str, Any] = {"block_size": K, "width": 64, "ridge_blocks": 1000, "rank": 8}


def weights(layers: int, pool: str = "softmax") -> GistEncodeWeights:
    draw = torch.Generator().manual_seed(0)
    made = GistEncodeWeights.init(
        24, 16, layers=layers, n_heads=2, ffn_dim=24, max_block_size=K, mu=torch.randn(24, generator=draw),
        target_rms=0.3, pool=pool, generator=draw,
    )  # fmt: skip
    return made.with_tensors(*(x + 0.3 * torch.randn(x.shape, generator=draw) for x in made.tensors()))


def blocks(m: int, seed: int = 1) -> Tensor:
    return torch.randn(2, m, K, 24, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pool", ["softmax", "mean"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_without_anything_on_the_left_it_is_gist_encode(layers: int, pool: str) -> None:
    w, x = weights(layers, pool), blocks(3)
    got = encode_with_left_context(x, w)
    want = gist_encode(x.flatten(0, 1), w, backend="ref")[:, 0].unflatten(0, (2, 3))
    torch.testing.assert_close(got[:, 0], want[:, 0], rtol=1e-4, atol=1e-5)
    if layers == 0:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    else:
        assert (got[:, 1:] - want[:, 1:]).abs().max() > 1e-3


def test_the_left_is_a_wider_window() -> None:
    """With one layer: the layer over both blocks at positions 0 to 2K - 1, of which the own tokens are pooled."""
    w, x = weights(1), blocks(2)
    h = unit_rms(x.flatten(1, 2)) @ w.w_in.T + w.level_emb[0]
    inv_freq = w.rope_theta ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = phases(torch.arange(2 * K), inv_freq, h.dtype)
    layer = (w.attn_norm[0], w.qkv[0], w.attn_out[0], w.ffn_norm[0], w.gate_up[0], w.down[0])
    h = _layer(h, cos, sin, w.n_heads, *layer)[:, K:]
    s = unit_rms(h) * w.final_norm
    pooled = (torch.softmax((w.pool_q @ s.transpose(-1, -2)) * w.width**-0.5, dim=-1) @ s)[:, 0]
    z = unit_rms(x[:, 1].mean(1) - w.mu) * w.target_rms + pooled @ w.w_out.T
    want = unit_rms(z) * w.gain * w.target_rms
    torch.testing.assert_close(encode_with_left_context(x, w)[:, 1], want, rtol=1e-4, atol=1e-5)


def test_a_block_sees_as_far_as_it_has_layers() -> None:
    """What is on the right never, what is on the left one block a layer."""
    w, x = weights(2), blocks(5)
    other = x.clone()
    other[:, 1] += 1.0
    moved = (encode_with_left_context(x, w) - encode_with_left_context(other, w)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False, True, True, True, False]


def test_hidden_states_at_unit_variance(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    inputs = BlockInputs.measured(model.decoder, [corpus()], 2, texts=16, length=64)
    same = BlockInputs.measured(model.decoder, [corpus()], 2, texts=16, length=64)
    assert inputs.mean is not None
    assert same.mean is not None
    assert torch.equal(inputs.mean, same.mean)
    ids = text(corpus, 400, seed=7)
    rows = inputs.rows(model.decoder, ids)[0, 1:]
    assert rows.mean(0).abs().max() < 0.5
    assert 0.8 < float(rows.std(0).mean()) < 1.2
    positions = torch.arange(400)[None]
    with torch.no_grad():
        raw = model.decoder(model.decoder.embed(ids), positions, stop_layer=2).hidden[0, 1:]
    assert inputs.scale is not None
    torch.testing.assert_close(rows * inputs.scale + inputs.mean, raw, rtol=1e-4, atol=1e-5)
    plain = BlockInputs.measured(model.decoder, [corpus()], 0)
    assert torch.equal(plain.rows(model.decoder, ids), model.decoder.embed(ids))
    with pytest.raises(InputError, match="at most"):
        BlockInputs.measured(model.decoder, [corpus()], model.config.n_layers + 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "projected", "inputs": "hidden:2"},
        {"kind": "projected", "layers": 1, "left_context": True},
        {"kind": "projected", "layers": 2, "inputs": "hidden:1", "left_context": True},
        {"kind": "embedding", "layers": 1, "left_context": True},
    ],
)
def test_they_train_and_make_no_file(
    settings: dict[str, Any], model: LoadedModel, corpus: Callable[..., Corpus]
) -> None:
    shape = NARROW if settings["kind"] == "projected" else {"block_size": K, "width": 64}
    start = GistNet.untrained(model.decoder, K)
    task = make_task(model.decoder, [corpus()], GistSettings(tokens=512, **shape, **settings), start)
    assert isinstance(task.maker, EmbeddingMaker)
    loss, _ = task.loss(random.Random(0))
    loss.backward()
    assert task.parameters["encode/w_out"].grad is not None
    assert task.parameters["encode/w_out"].grad.abs().max() > 0
    with pytest.raises(InputError, match="embeddings of a block alone"):
        task.maker.install(start, task.parameters)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "embedding", "inputs": "hidden:2"}, {"inputs": "hidden:2"}, {"left_context": True},
        {"kind": "projected", "inputs": "hidden:0"}, {"kind": "projected", "inputs": "hidden"},
        {"kind": "projected", "layers": 0, "left_context": True},
        {"kind": "projected", "left_context": True, "curriculum": (0.2, 0.2)},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        GistSettings(**settings)
