"""Gists of level 2 that are trained alone: what a sample has before it, and that the gradient is the loss's."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from slopes import assert_gradient_is_slope
from torch import Tensor

from mc_kernels import GistPoolWeights, gist_pool
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_start import GistSettings, make_task
from mc_runtime.train.layouts import Entry
from mc_runtime.train.level2_task import WINDOWS, Level2Task
from mc_runtime.train.pooled_maker import PooledMaker

K = 4
Corpora = Callable[..., Corpus]


def task_of(model: LoadedModel, corpus: Corpus, *, gists: int = 1, noise: float = 0.1, **options: object) -> Level2Task:
    c, generator = model.config, torch.Generator().manual_seed(0)
    weights = []
    for children in (K, K * gists):
        zeros = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, gists, children, c.head_dim)
        weights.append(
            GistPoolWeights(*(x + noise * torch.randn(x.shape, generator=generator) for x in zeros.tensors()))
        )
    given: dict = {"near": 8, "tokens": 80} | options
    return Level2Task(model.decoder, [corpus], PooledMaker(weights, frozen_levels=[1]), GistTaskOptions(**given))


@pytest.mark.parametrize("gists", [1, 2])
def test_windows_begin_at_any_block(model: LoadedModel, corpus: Corpora, gists: int) -> None:
    t = task_of(model, corpus(), gists=gists)
    ids = torch.from_numpy(corpus().sample(random.Random(0), 2 * K * K + 8))[None].repeat(2, 1)
    k, v, _ = t.read(ids)
    assert k is not None
    assert v is not None
    first, second = t.maker.weights()
    below, (k2, v2) = t._pooled(k, v, [(0, 0), (1, 3), (0, K)])
    assert below.span == K // gists
    for window, (row, start) in enumerate([(0, 0), (1, 3), (0, K)]):
        span = slice(start * K, (start + K) * K)
        children = (x[:, row, :, span].unflatten(2, (K, K)) for x in (k, v))
        k1, v1 = (x.flatten(2, 3)[:, :, None] for x in gist_pool(*children, first))
        wanted = gist_pool(k1, v1, second)
        for got, want in zip((k2, v2), wanted, strict=True):
            torch.testing.assert_close(got[:, :, window * gists : (window + 1) * gists], want[:, :, 0])


@pytest.mark.parametrize("crowd", [0, 3])
def test_each_sample_has_a_gist_of_its_own(
    model: LoadedModel, corpus: Corpora, monkeypatch: pytest.MonkeyPatch, crowd: int
) -> None:
    t = task_of(model, corpus(), crowd=crowd, crowded=1.0)
    seen: list[tuple[list[tuple[int, int]], list[list[Entry]], tuple[Tensor, Tensor]]] = []
    plain = t.run

    def run(*args: object, crowd: tuple[Tensor, Tensor]) -> Tensor:
        seen.append((args[4], args[5], crowd))  # type: ignore[arg-type]
        return plain(*args, crowd=crowd)  # type: ignore[arg-type]

    monkeypatch.setattr(t, "run", run)
    rng = random.Random(1)
    for _ in range(4):
        t.loss(rng)
    starts, preceded = set(), set()
    for samples, layouts, (k, _) in seen:
        count = len(samples)
        assert count == 2 * WINDOWS
        for i, ((_, cut), layout) in enumerate(zip(samples, layouts, strict=True)):
            start = cut // K - K
            starts.add(start)
            assert layout[0] == Entry(0, 0)
            assert layout[-1] == Entry(2, i)
            before = [e for e in layout if e.level == 1]
            assert before in ([], [Entry(1, j) for j in range(start)])
            preceded.add(bool(before))
            others = [e.index for e in layout[:-1] if e.level == 2]
            assert all(count <= index < k.shape[2] for index in others)
            assert crowd or not others
    assert starts == set(range(K + 1))
    assert preceded == {False, True}
    assert any(len(layout) > K + 2 for _, layouts, _ in seen for layout in layouts) == bool(crowd)


@pytest.mark.parametrize("crowd", [0, 3])
def test_gradient_by_finite_differences(model: LoadedModel, corpus: Corpora, crowd: int) -> None:
    t = task_of(model, corpus(), crowd=crowd, crowded=1.0, gist_bias=-1.0)
    loss, figures = t.loss(random.Random(5))
    assert figures["nll"] > 0
    loss.backward()
    trained = [name for name in t.parameters if not name.startswith("pool1")]
    assert all(p.grad is None for name, p in t.parameters.items() if name not in trained)
    assert_gradient_is_slope(t, trained)


@pytest.mark.parametrize("levels", [(2,), (1, 2), (1,)])
def test_settings_ask_for_it(model: LoadedModel, corpus: Corpora, levels: Sequence[int]) -> None:
    settings = GistSettings(block_size=8, levels=2, train_levels=tuple(levels))
    task = make_task(model.decoder, [corpus()], settings, GistNet.untrained(model.decoder, 8))
    assert isinstance(task, Level2Task) == (levels == (2,))


@pytest.mark.parametrize(
    "wrong", [{"reconstruct": 0.1}, {"contrast": 0.1}, {"curriculum": (0.1, 0.1)}, {"objective": "hidden:1"}]
)
def test_what_it_does_not_count_is_refused(model: LoadedModel, corpus: Corpora, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match="train_levels: level 2 alone"):
        task_of(model, corpus(), **wrong)
