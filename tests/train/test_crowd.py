"""Gists of unrelated texts among a sample's own: what is drawn, where it stands, and that opened tokens run on it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch

from mc_kernels import GistPoolWeights
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.crowd import Crowd
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.layouts import Entry, LayoutOptions, gather_layouts, split_entries
from mc_runtime.train.pooled_maker import PooledMaker

K, FAR, NEAR = 4, 32, 8
Corpora = Callable[..., Corpus]


def weights(model: LoadedModel, levels: int) -> list[GistPoolWeights]:
    c = model.config
    return [GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)] * levels


def task_of(model: LoadedModel, corpus: Corpus, levels: int = 2, **options: object) -> GistTask:
    given: dict = {"lengths": (FAR,), "length_weights": (1,), "cuts": (1,), "near": NEAR, "tokens": 80, "crowd": 3}
    given |= {"crowded": 1.0, "layout": LayoutOptions(true_positions=0.0)} | options
    return GistTask(model.decoder, [corpus], weights(model, levels), GistTaskOptions(**given))


@pytest.mark.parametrize("levels", [1, 2])
def test_draws_name_what_there_is(model: LoadedModel, corpus: Corpora, levels: int) -> None:
    crowd = Crowd(model.decoder, [corpus()], PooledMaker(weights(model, levels)), 3)
    rng, sizes = random.Random(0), []
    k, v = crowd.gists(rng)
    count = 3 * K + (3 if levels == 2 else 0) + 1
    assert k.shape == v.shape == (model.config.n_layers, model.config.n_kv_heads, count, model.config.head_dim)
    above = k[:, :, -1 - (3 if levels == 2 else 3 * K) : -1].mean(2)
    torch.testing.assert_close(k[:, :, -1], above)
    for _ in range(100):
        entries = crowd.draw(rng, (1,) * levels)
        assert {e.level for e in entries} <= {levels + 1}
        assert all(0 <= e.index < count for e in entries)
        sizes.append(len(entries))
    assert min(sizes) < 10 < 60 < max(sizes), "few and many"


def test_the_same_texts_every_time(model: LoadedModel, corpus: Corpora) -> None:
    a, b = (Crowd(model.decoder, [corpus()], PooledMaker(weights(model, 1)), 3) for _ in range(2))
    assert torch.equal(a.k, b.k)
    assert a.k.shape[3] == K * K
    assert not torch.equal(a.k[:, 0], a.k[:, 1])


def test_stands_behind_the_sink(model: LoadedModel, corpus: Corpora) -> None:
    task, rng = task_of(model, corpus()), random.Random(1)
    text = corpus().sample(rng, FAR)[None]
    k, v, _ = task.read(torch.from_numpy(text))
    levels = task.maker.make(model.decoder, torch.from_numpy(text), k, v, 1)
    own = [Entry(0, 0), Entry(1, 0), *(Entry(0, i) for i in range(K, 2 * K)), Entry(1, 2)]
    for all_before in (True, False):
        layout = task._crowded(rng, own, levels, all_before=all_before)
        assert layout[0] == Entry(0, 0)
        assert [e for e in layout if e.level < 3] == own
        if all_before:
            assert layout[-len(own) + 1 :] == own[1:]
    where = gather_layouts([[Entry(0, 0), Entry(3, 5), Entry(1, 1)]], [FAR], FAR, K, [True], (1, 1))
    assert where.index.tolist() == [[0, FAR + FAR // K + FAR // K**2 + 5, FAR + 1]]


def test_opened_tokens_run_on_what_stands_before_them(model: LoadedModel, corpus: Corpora) -> None:
    """`fresh` equals running every token of the layout in order behind the first block and the gists."""
    task, rng = task_of(model, corpus()), random.Random(2)
    ids = torch.from_numpy(corpus().sample(rng, FAR + NEAR))[None]
    k, v, _ = task.read(ids)
    levels = task.maker.make(model.decoder, ids, k, v, 1)
    crowd = task.crowd.gists(rng)
    layout = [
        *(Entry(0, i) for i in range(K)),
        Entry(3, 2),
        Entry(1, 1),
        *(Entry(0, 8 + i) for i in range(K)),
        Entry(1, 3),
    ]
    found = task.run(ids, k, v, levels, [(0, 16)], [layout], [True], NEAR, crowd=crowd, fresh=True)

    # One forward of all tokens, over a store that holds the gists at their ranks.
    from mc_runtime.model.stores import ConcatStore

    assert k is not None
    assert v is not None
    gists = [levels[0].kv, levels[0].kv]
    assert gists[0] is not None
    ranks = [i for i, e in enumerate(layout) if e.level > 0]
    columns = []
    for which, tokens in enumerate((k, v)):
        own = levels[0].kv
        assert own is not None
        columns.append(
            torch.cat(
                (
                    tokens[:, :, :, :K],
                    crowd[which][:, None, :, 2:3],
                    own[which][:, :, :, 1:2],
                    own[which][:, :, :, 3:4],
                ),
                3,
            )
        )
    store = ConcatStore(*columns, torch.tensor([[*range(K), *ranks]]))
    run = torch.cat((ids[:, 8 : 8 + K], ids[:, 16 : 16 + NEAR]), 1)
    at = torch.tensor(
        [[*(i for i, e in enumerate(layout) if e.level == 0 and i >= K), *range(len(layout), len(layout) + NEAR)]]
    )
    expected = model.decoder(model.decoder.embed(run), at, store).hidden[:, -NEAR:]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_crowd(model: LoadedModel, corpus: Corpora) -> None:
    task = task_of(model, corpus())
    k, v = task.crowd.gists(random.Random(0))
    (k.sum() + v.sum()).backward()
    assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for n, p in task.parameters.items() if "/c" in n)
    loss, figures = task.loss(random.Random(5))
    loss.backward()
    assert bool(loss.isfinite())
    assert figures["nll"] > 0


def test_a_log_weight_of_log_2_counts_as_two_gists(model: LoadedModel, corpus: Corpora) -> None:
    """At global positions two copies of a gist stand at one place."""
    ids = torch.from_numpy(corpus().sample(random.Random(4), FAR + NEAR))[None]
    layout = [*(Entry(0, i) for i in range(K)), Entry(1, 1), Entry(1, 3)]
    found = []
    for bias, entries in ((math.log(2), layout), (0.0, [*layout, *layout[K:]]), (0.0, layout)):
        task = task_of(model, corpus(), gist_bias=bias)
        k, v, _ = task.read(ids)
        levels = task.maker.make(model.decoder, ids, k, v, 1)
        found.append(task.run(ids, k, v, levels, [(0, FAR)], [entries], [False], NEAR))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - found[2]).abs().max() > 1e-3


def test_splitting_keeps_order() -> None:
    where = gather_layouts([[Entry(0, 0), Entry(1, 0), Entry(0, 9)], [Entry(0, 0)]], [12, 4], 12, K, [True, True], (1,))
    (index, position), (rest, rest_at) = split_entries(where, where.index >= 12)
    assert index.tolist() == [[12], [0]]
    assert position.tolist() == [[1], [-1]]
    assert rest.tolist() == [[0, 9], [0, 0]]
    assert rest_at.tolist() == [[0, 2], [0, -1]]


@pytest.mark.parametrize("options", [{"objective": "hidden:2"}, {"curriculum": (0.2, 0.2)}])
def test_refusals(model: LoadedModel, corpus: Corpora, options: dict) -> None:
    with pytest.raises(InputError, match="crowd"):
        task_of(model, corpus(), levels=1, **options)
