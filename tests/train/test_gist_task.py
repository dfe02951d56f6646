"""What a training sample sees, and that the gradient is the loss's."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from slopes import assert_gradient_is_slope

from mc_kernels import GistPoolWeights
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.layouts import Entry, LayoutOptions, draw_layout, gather_layouts
from mc_runtime.train.pooled_maker import pool_levels

K = 4


def task(model: LoadedModel, corpus: Corpus, levels: int = 1, **options: object) -> GistTask:
    c = model.config
    weights = [GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim) for _ in range(levels)]
    given: dict = {"lengths": (16, 32), "length_weights": (1, 1), "cuts": (1, 2), "near": 8, "tokens": 80} | options
    return GistTask(model.decoder, [corpus], weights, GistTaskOptions(**given))


@pytest.mark.parametrize("seed", range(20))
def test_layouts_tile_the_past(seed: int) -> None:
    rng = random.Random(seed)
    blocks = rng.randint(1, 20)
    layout = draw_layout(rng, blocks, K, LayoutOptions(whole=0.5, sink_block=0.5, level2=0.5))
    assert layout[0] == Entry(0, 0)
    covered: list[int] = []
    body = layout if layout[1:2] == [Entry(0, 1)] else layout[1:]  # without a sink block the sink is an extra
    for entry in body:
        covered += range(entry.index * K**entry.level, (entry.index + 1) * K**entry.level)
    assert covered == list(range(blocks * K))


def test_shares() -> None:
    rng = random.Random(0)
    whole = [draw_layout(rng, 8, K, LayoutOptions(whole=1.0, sink_block=0.0)) for _ in range(20)]
    assert all(layout == [Entry(0, 0)] + [Entry(1, i) for i in range(8)] for layout in whole)
    two = draw_layout(rng, 9, K, LayoutOptions(whole=1.0, sink_block=0.0, level2=1.0))
    assert two == [Entry(0, 0), Entry(2, 0), Entry(2, 1), Entry(1, 8)]


def test_gathering() -> None:
    a, b = [Entry(0, 0), Entry(2, 0), Entry(1, 4)], [Entry(0, 0)]
    where = gather_layouts([a, b, a], [20, 4, 20], 24, K, [True, True, False])
    assert where.index.tolist() == [[0, 24 + 6, 24 + 4], [0, 0, 0], [0, 30, 28]]
    assert where.position.tolist() == [[0, 1, 2], [0, -1, -1], [0, 7, 17]]
    assert where.start.tolist() == [3, 1, 20]


def test_all_tokens_kept_is_the_teacher(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """Nothing gisted, true positions: the pieces' hidden states are those of the full context."""
    t = task(model, corpus())
    ids = torch.from_numpy(corpus().sample(random.Random(0), 40))[None].repeat(2, 1)
    k, v, teacher = t.read(ids)
    layout = [Entry(0, i) for i in range(16)]
    levels = t.maker.make(model.decoder, ids, k, v, 1)
    hidden = t.run(ids, k, v, levels, [(0, 16), (1, 16)], [layout] * 2, [True, False], 8)
    torch.testing.assert_close(hidden, teacher[:, 16:24], rtol=1e-4, atol=1e-4)


def test_pooling_starts_as_the_mean(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    t = task(model, corpus(), levels=2)
    k, v, _ = t.read(torch.from_numpy(corpus().sample(random.Random(0), 35))[None])
    (k1, v1), (k2, _) = pool_levels(k, v, t.maker.weights(), K)
    assert k1.shape[3] == 8
    assert k2.shape[3] == 2
    torch.testing.assert_close(k1[:, :, :, 1], k[:, :, :, 4:8].mean(3))
    torch.testing.assert_close(v1[:, :, :, 7], v[:, :, :, 28:32].mean(3))
    torch.testing.assert_close(k2[:, :, :, 0], k[:, :, :, :16].mean(3))


@pytest.mark.parametrize("levels", [1, 2])
def test_gradient_by_finite_differences(model: LoadedModel, corpus: Callable[..., Corpus], levels: int) -> None:
    layout = LayoutOptions(level2=0.5 if levels == 2 else 0.0)
    t = task(model, corpus(), levels, layout=layout, lengths=(32,), length_weights=(1,), cuts=(2,))
    generator = torch.Generator().manual_seed(0)
    for p in t.parameters.values():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    loss, _ = t.loss(random.Random(5))
    loss.backward()
    assert_gradient_is_slope(t, t.parameters)
