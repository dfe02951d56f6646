"""The objective `attention`: what it measures, against the model itself and against the op, and its gradient."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import GistPoolWeights, context_attention
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.attention_match import Recording, matching_loss, recording, residual_fisher
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_kinds import LevelGists
from mc_runtime.train.gist_start import GistSettings
from mc_runtime.train.gist_task import ATTENTION, GistTask, GistTaskOptions
from mc_runtime.train.layouts import Entry, LayoutOptions, draw_layout, gather_layouts

K, NEAR, FAR = 4, 8, 32
Corpora = Callable[..., Corpus]


def task_of(model: LoadedModel, corpus: Corpus, levels: int = 1, **options: object) -> GistTask:
    c = model.config
    children = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)
    given: dict = {"lengths": (FAR,), "length_weights": (1,), "cuts": (1,), "near": NEAR, "tokens": 80, "pieces": 3}
    given |= {"objective": ATTENTION} | options
    return GistTask(model.decoder, [corpus], [children] * levels, GistTaskOptions(**given))


class Setup:
    """Two sequences, read and recorded, with gists; samples with some blocks open."""

    def __init__(self, task: GistTask, layout: LayoutOptions, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.task = task
        self.ids = torch.from_numpy(task.corpora[0].sample(rng, 2 * (FAR + NEAR))).view(2, -1)
        with recording(task.decoder) as self.record:
            k, v, _ = task.read(self.ids)
        assert k is not None
        assert v is not None
        self.k, self.v = k, v
        self.levels = task.maker.make(task.decoder, self.ids, k, v, 1)
        self.rows, self.cuts = torch.tensor([0, 1, 1]), torch.tensor([FAR, FAR // 2, FAR])
        layouts = [draw_layout(rng, int(cut) // K, K, layout) for cut in self.cuts]
        self.where = gather_layouts(layouts, self.cuts.tolist(), FAR + NEAR, K, [True, True, False], (1,))

    def loss(self, levels: list[LevelGists] | None = None, record: Recording | None = None) -> Tensor:
        return matching_loss(
            self.task.decoder, record or self.record, self.k, self.v, levels or self.levels, self.rows, self.cuts,
            self.where, NEAR, self.task.fisher,
        )  # fmt: skip


def test_recording_is_what_attention_did(model: LoadedModel, corpus: Corpora) -> None:
    s = Setup(task_of(model, corpus()), LayoutOptions())
    positions = torch.arange(FAR + NEAR).expand(2, -1)
    assert len(s.record.queries) == model.config.n_layers
    for layer in range(model.config.n_layers):
        out: Any = context_attention(
            s.record.queries[layer], s.k[layer], s.v[layer], positions, positions, model.decoder.rope
        )
        torch.testing.assert_close(out.transpose(1, 2).flatten(2), s.record.outputs[layer], rtol=1e-4, atol=1e-5)


def test_nothing_is_recorded_afterwards(model: LoadedModel, corpus: Corpora) -> None:
    s = Setup(task_of(model, corpus()), LayoutOptions())
    before = len(s.record.queries)
    s.task.read(s.ids)
    assert len(s.record.queries) == len(s.record.outputs) == before


def test_text_itself_costs_nothing(model: LoadedModel, corpus: Corpora) -> None:
    """Everything in full at true positions: attention reads what it read."""
    s = Setup(task_of(model, corpus()), LayoutOptions())
    layouts = [[Entry(0, i) for i in range(int(cut))] for cut in s.cuts]
    s.where = gather_layouts(layouts, s.cuts.tolist(), FAR + NEAR, K, [False] * 3, (1,))
    assert float(s.loss().sum().detach()) < 1e-9
    s.where = gather_layouts([layout[: K * 2] for layout in layouts], s.cuts.tolist(), FAR + NEAR, K, [False] * 3, (1,))
    assert float(s.loss().sum().detach()) > 1e-4


@pytest.mark.parametrize("layout", [LayoutOptions(whole=1.0), LayoutOptions(whole=0.0), LayoutOptions(sink_block=1.0)])
def test_equals_attention_over_all_entries(model: LoadedModel, corpus: Corpora, layout: LayoutOptions) -> None:
    """Tokens and gists apart, merged by their sums, are one attention over both."""
    s = Setup(task_of(model, corpus()), layout)
    decoder, fisher = model.decoder, s.task.fisher
    at = s.cuts[:, None] + torch.arange(NEAR)
    q_pos = s.where.start[:, None] + torch.arange(NEAR)
    # `where` counts tokens, then gists: the near tokens' place in that order is their own.
    index, pos = torch.cat((s.where.index, at), 1), torch.cat((s.where.position, q_pos), 1)
    kv = s.levels[0].kv
    assert kv is not None
    found = s.loss()
    for number, layer in enumerate(decoder.layers):
        keys, values = (
            torch.cat((x[number], gist[number]), 2).transpose(1, 2)[s.rows[:, None], index].transpose(1, 2)
            for x, gist in zip((s.k, s.v), kv, strict=True)
        )
        q = s.record.queries[number].transpose(1, 2)[s.rows[:, None], at].transpose(1, 2)
        out: Any = context_attention(q, keys, values, q_pos, pos, decoder.rope)
        aim = s.record.outputs[number][s.rows[:, None], at]
        module: Any = layer
        error = module.attention.out(out.transpose(1, 2).flatten(2) - aim)
        expected = 0.5 * (error.square().mean((0, 1)) * fisher[number]).sum()
        torch.testing.assert_close(found[number], expected, rtol=1e-3, atol=1e-8)


def test_gradient(model: LoadedModel, corpus: Corpora) -> None:
    """Of one number of the gists' keys and one of their values, against a difference."""
    s = Setup(task_of(model, corpus()), LayoutOptions(whole=1.0, sink_block=0.0))
    kv = s.levels[0].kv
    assert kv is not None
    leaves = [x.detach().clone().requires_grad_() for x in kv]
    s.loss([LevelGists(K, kv=(leaves[0], leaves[1]))]).sum().backward()
    for which in (0, 1):
        place = (1, 0, 0, 2, 3)
        moved, step = [], 3e-2
        for sign in (1, -1):
            changed = [x.detach().clone() for x in leaves]
            changed[which][place] += sign * step
            moved.append(float(s.loss([LevelGists(K, kv=(changed[0], changed[1]))]).sum()))
        grad = leaves[which].grad
        assert grad is not None
        assert float(grad[place]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.05, abs=1e-6)


def test_fisher_is_the_curvature_of_kl(model: LoadedModel) -> None:
    """A small random push of one layer's attention output costs 1/2 F d^2 nats, summed over later tokens."""
    decoder = model.decoder
    ids = torch.randint(0, model.config.vocab_size, (6, 48), generator=torch.Generator().manual_seed(1))
    draws = [residual_fisher(decoder, ids, torch.Generator().manual_seed(seed)) for seed in range(12)]
    fisher = torch.stack(draws).mean(0)
    positions = torch.arange(48).expand(6, -1)
    layer, size, at = 1, 0.02, 20
    attention: Any = decoder.layers[layer]
    with torch.no_grad():
        before = torch.log_softmax(decoder.logits(decoder(decoder.embed(ids), positions).hidden).double(), -1)
    total, trials = 0.0, 30
    generator = torch.Generator().manual_seed(2)
    for _ in range(trials):
        push = torch.randn(6, model.config.embed_dim, generator=generator) * size

        def add(_m: object, _i: object, output: Tensor, push: Tensor = push) -> Tensor:
            output = output.clone()
            output[:, at] += push
            return output

        hook = attention.attention.out.register_forward_hook(add)
        with torch.no_grad():
            after = torch.log_softmax(decoder.logits(decoder(decoder.embed(ids), positions).hidden).double(), -1)
        hook.remove()
        total += float((before.exp() * (before - after)).sum(-1).sum(1).mean())
    predicted = 0.5 * float(fisher[layer].sum()) * size**2
    # F is averaged over places, of which an early one reaches more tokens than a late one: the order is what counts.
    assert predicted / 4 < total / trials < predicted * 4


@pytest.mark.parametrize("levels", [1, 2])
def test_loss_falls(model: LoadedModel, corpus: Corpora, levels: int) -> None:
    task = task_of(model, corpus(), levels, layout=LayoutOptions(level2=0.5 if levels == 2 else 0.0))
    optimizer = torch.optim.Adam(task.parameters.values(), lr=3e-2)
    seen = []
    for _ in range(40):
        loss, figures = task.loss(random.Random(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(figures["loss"])
    assert seen[-1] < 0.8 * seen[0]
    assert all(bool(p.grad is not None and p.grad.isfinite().all()) for p in task.parameters.values())


def test_match_beside_logits(model: LoadedModel, corpus: Corpora) -> None:
    alone = task_of(model, corpus(), objective="logits").loss(random.Random(3))[1]
    both = task_of(model, corpus(), objective="logits", match=2.0).loss(random.Random(3))[1]
    assert both["nll"] == pytest.approx(alone["nll"])
    assert both["loss"] == pytest.approx(alone["loss"] + 2.0 * both["match"], rel=1e-5)


def test_refusals(model: LoadedModel, corpus: Corpora) -> None:
    with pytest.raises(InputError, match="match"):
        GistTaskOptions(objective=ATTENTION, match=1.0)
    with pytest.raises(InputError, match="match"):
        GistTaskOptions(match=-1.0)
    with pytest.raises(InputError, match="questions"):
        task_of(model, corpus(), questions=0.5)
    with pytest.raises(InputError, match="pieces"):
        GistSettings(pieces=0)
