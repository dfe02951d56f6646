"""The projector's start: reduced-rank ridge regression."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from test_gist_makers import SMALL, K, maker_of
from torch import Tensor

from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_kinds import GistMaker
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.layouts import LayoutOptions
from mc_runtime.train.ridge import Moments, collect, fit_ridge, group_scale, ridge_projector
from mc_runtime.train.vector_makers import EmbeddingMaker, ProjectedMaker

RANK, INPUTS, OUTPUTS = 3, 12, 40


def planted(noise: float, n: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs with a mean, outputs of a rank-3 map with a mean and groups of very different size."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = draw(n, INPUTS) @ draw(INPUTS, INPUTS) + 3 * draw(INPUTS)
    w = draw(INPUTS, RANK) @ draw(RANK, OUTPUTS)
    w[:, 20:] *= 100.0
    y = x @ w + 5 * draw(OUTPUTS)
    y += noise * draw(n, OUTPUTS) * (y - y.mean(0)).std(0)
    return x, y, w


def moments(x: Tensor, y: Tensor) -> Moments:
    out = Moments(INPUTS, OUTPUTS)
    for a, b in zip(x.split(64), y.split(64), strict=True):
        out.add(a, b)
    return out


def test_moments_are_those_of_the_rows() -> None:
    x, y, _ = planted(0.1)
    mean_x, mean_y, xx, xy, yy = moments(x, y).centred()
    a, b = x - x.mean(0), y - y.mean(0)
    for got, want in (
        (mean_x, x.mean(0)), (mean_y, y.mean(0)), (xx, a.T @ a / len(x)), (xy, a.T @ b / len(x)),
        (yy, b.square().mean(0)),
    ):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_a_planted_map_is_found() -> None:
    x, y, w = planted(noise=0.3)
    fit, held_out = moments(x[:3000], y[:3000]), moments(x[3000:], y[3000:])
    scale = group_scale(fit, 20)
    found = fit_ridge(fit, 1e-4, RANK, scale)
    full = fit_ridge(fit, 1e-4, INPUTS, scale)
    assert found.down.shape == (RANK, INPUTS)
    error = ((found.up @ found.down).T - w) / scale
    assert error.norm() < 0.05 * (w / scale).norm()
    # What is left is the noise: 0.09 of 1.09.
    assert found.explained(held_out, scale) == pytest.approx(1 / 1.09, abs=0.02)
    # Three directions carry the map; two do not, and twelve fit noise.
    assert full.explained(held_out, scale) <= found.explained(held_out, scale) + 1e-3
    assert fit_ridge(fit, 1e-4, 2, scale).explained(held_out, scale) < found.explained(held_out, scale) - 0.05


def test_explained_is_what_the_rows_say() -> None:
    x, y, _ = planted(noise=0.5)
    found = fit_ridge(moments(x[:3000], y[:3000]), 1e-2, 2, torch.ones(OUTPUTS, dtype=torch.float64))
    a, b = x[3000:], y[3000:]
    made = a @ found.down.T @ found.up.T + found.bias
    scale = torch.linspace(1, 2, OUTPUTS, dtype=torch.float64)
    want = 1 - ((made - b) / scale).square().sum() / ((b - b.mean(0)) / scale).square().sum()
    assert found.explained(moments(a, b), scale) == pytest.approx(float(want), abs=1e-4)


def test_the_code_has_unit_variance() -> None:
    x, y, _ = planted(noise=0.1)
    fit = moments(x, y)
    code = x @ fit_ridge(fit, 1e-6, RANK, group_scale(fit, 20)).down.T
    torch.testing.assert_close(code.std(0), torch.ones(RANK, dtype=torch.float64), rtol=1e-2, atol=0)


def test_projected_gists_start_near_pooled_ones(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """After the ridge start they beat a projector of zeros, which says the mean of all blocks."""
    c, text = model.config, corpus()
    base = GistNet.untrained(model.decoder, K)
    vectors = EmbeddingMaker(base.encode_weights, K)
    fit, held_out = collect(
        model.decoder,
        [text],
        lambda ids: vectors.vectors(model.decoder.embed(ids))[0],
        base.pool_weights[0],
        blocks=400,
        length=128,
    )
    assert fit.n >= 400
    assert held_out.n > 0
    projector, share, full = ridge_projector(model.decoder, fit, held_out, rank=8)
    assert projector.down.shape == (8, c.embed_dim)
    assert projector.up.shape == (c.n_layers, 2, c.n_kv_heads, c.head_dim, 8)
    assert 0.1 < share <= full < 1
    layout = LayoutOptions(whole=1.0, sink_block=0.0, true_positions=0.0)
    options = GistTaskOptions(**SMALL | {"layout": layout, "teacher": 1.0})

    def loss(maker: GistMaker) -> float:
        task = GistTask(model.decoder, [text], maker, options)
        with torch.no_grad():
            return sum(float(task.loss(random.Random(i))[0]) for i in range(12))

    started = ProjectedMaker(base.encode_weights, projector, K)
    zero = ProjectedMaker(base.encode_weights, projector, K)
    for name in ("down", "up", "bias"):
        zero.parameters[f"project/{name}"].data.zero_()
    assert loss(started) < 0.98 * loss(zero)
    assert loss(started) < 1.1 * loss(maker_of("pooled", model))
