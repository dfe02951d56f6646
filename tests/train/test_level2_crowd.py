"""A crowd of which level 1 is kept and level 2 is pooled anew: what it holds, and what one sample shows of it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from mc_kernels import GistPoolWeights, gist_pool
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.crowd import RUNS, TOPS, Crowd
from mc_runtime.train.level2_crowd import Level2Crowd
from mc_runtime.train.pooled_maker import PooledMaker

K, TEXTS = 4, 9
Corpora = Callable[..., Corpus]


def maker_of(model: LoadedModel, gists: int) -> PooledMaker:
    c, generator = model.config, torch.Generator().manual_seed(0)
    weights = []
    for children in (K, K * gists):
        zeros = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, gists, children, c.head_dim)
        weights.append(GistPoolWeights(*(x + 0.1 * torch.randn(x.shape, generator=generator) for x in zeros.tensors())))
    return PooledMaker(weights, frozen_levels=[1])


@pytest.mark.parametrize("gists", [1, 2])
def test_it_holds_the_gists_of_its_texts(model: LoadedModel, corpus: Corpora, gists: int) -> None:
    maker = maker_of(model, gists)
    crowd = Level2Crowd(model.decoder, [corpus()], maker, TEXTS)
    plain = Crowd(model.decoder, [corpus()], maker, TEXTS)  # of the same texts, in full
    assert torch.equal(crowd.ids, plain.ids)
    first, second = maker.weights()
    keys, values = (x.unflatten(3, (K, K)).flatten(0, 1) for x in (plain.k, plain.v))
    below = [x.flatten(2, 3).unflatten(0, plain.k.shape[:2]) for x in gist_pool(keys, values, first)]
    torch.testing.assert_close([crowd.k, crowd.v], below)
    above = gist_pool(below[0].transpose(1, 2), below[1].transpose(1, 2), second)
    found = crowd.gists(random.Random(3))
    shown = random.Random(3).sample(range(TEXTS), RUNS)
    runs = RUNS * K * gists
    for k, of_text, of_level2 in zip(found, below, above, strict=True):
        assert k.shape[2] == runs + TEXTS * gists + 1
        for at, text in enumerate(shown):
            torch.testing.assert_close(k[:, :, at * K * gists : (at + 1) * K * gists], of_text[:, text])
        torch.testing.assert_close(k[:, :, runs:-1], of_level2.flatten(2, 3))
        torch.testing.assert_close(k[:, :, -1], k[:, :, runs:-1].mean(2))


def test_level_2_alone_gets_gradients(model: LoadedModel, corpus: Corpora) -> None:
    maker = maker_of(model, 1)
    k, v = Level2Crowd(model.decoder, [corpus()], maker, TEXTS).gists(random.Random(0))
    (k.square().sum() + v.square().sum()).backward()
    for name, p in maker.parameters.items():
        assert (p.grad is None) == name.startswith("pool1"), name
        assert p.grad is None or bool(p.grad.abs().max() > 0), name


@pytest.mark.parametrize("gists", [1, 2])
@pytest.mark.parametrize("texts", [2, TEXTS, 150])
def test_draws_are_of_different_texts(
    model: LoadedModel, corpus: Corpora, monkeypatch: pytest.MonkeyPatch, texts: int, gists: int
) -> None:
    monkeypatch.setattr(Crowd, "__init__", lambda *_: None)  # nothing is read
    crowd = Level2Crowd(model.decoder, [corpus()], maker_of(model, gists), texts)
    crowd.maker, crowd.texts = maker_of(model, gists), texts
    rng, sizes = random.Random(0), []
    runs = min(RUNS, texts) * K * gists
    top = runs + texts * gists
    for _ in range(300):
        entries = crowd.draw(rng, (gists, gists))
        assert {e.level for e in entries} <= {3}
        seen = Counter(e.index for e in entries)
        assert all(count == 1 or index == top for index, count in seen.items())
        assert seen[top] <= TOPS
        assert all(0 <= index <= top for index in seen)
        for at, e in enumerate(entries):  # siblings, and the gists of one text, stand side by side and in order
            whole = K * gists if e.index < runs else gists
            if e.index < top and (e.index if e.index < runs else e.index - runs) % whole == 0:
                assert [x.index for x in entries[at : at + whole]] == list(range(e.index, e.index + whole))
        sizes.append(sum(runs <= index < top for index in seen) // gists)
    assert min(sizes) == 0
    assert max(sizes) > 0.9 * texts
    few = sum(size <= 0.2 * texts for size in sizes) / len(sizes)
    assert 0.2 < few < 0.8, "few as often as many"
