"""Rivals against what their papers' mechanisms must give in limits that are known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.errors import InputError, ModelError
from mc_runtime.eval.pasts import Past, hidden_after, read_past
from mc_runtime.eval.rivals import Rival
from mc_runtime.eval.rivals.compressive import MeanKV
from mc_runtime.eval.rivals.gist_tokens import GistTokens
from mc_runtime.eval.rivals.gist_tokens_task import GistTokensOptions, GistTokensTask
from mc_runtime.eval.rivals.gists import EmbeddingGists, PooledGists, ProjectedGists
from mc_runtime.eval.rivals.infllm import InfLLM
from mc_runtime.eval.rivals.lineup import RIVALS, ours_for, rivals_for
from mc_runtime.eval.rivals.memorizing import Memorizing
from mc_runtime.eval.rivals.per_query import Choice, PerQueryRival
from mc_runtime.eval.rivals.random_tokens import RandomTokens
from mc_runtime.eval.rivals.recency import Recency
from mc_runtime.eval.rivals.retro import Retro
from mc_runtime.eval.rivals.snapkv import SnapKV
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.model import layers as layers_module

FAR, RECENT, TARGETS, BATCH = 64, 8, 12, 3
FOLLOW = RECENT + TARGETS


@pytest.fixture(scope="module")
def past(model: LoadedModel) -> Past:
    ids = torch.randint(0, 200, (BATCH, FAR + FOLLOW), generator=torch.Generator().manual_seed(0))
    return read_past(model.decoder, ids, FAR, RECENT)


def every_rival(model: LoadedModel, ratio: int) -> list[Rival]:
    tokens = GistTokens(model.decoder.embedding[: 32 // ratio].float(), 32)
    net = GistNet.untrained(model.decoder, 32)
    level1 = [EmbeddingGists("e", net, 32), ProjectedGists("p", net, 32)] if ratio == 32 else []
    return [*rivals_for(list(RIVALS), model, ratio, 32, [tokens]), *ours_for(["pooled"], net, "", ratio, 32), *level1]


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "rival", [Recency(), Recency(4), SnapKV(), SnapKV(5), RandomTokens(), InfLLM(), InfLLM(1), InfLLM(16)]
)
def test_all_slots_are_the_full_context(past: Past, rival: Rival, packed: bool) -> None:
    with torch.no_grad():
        hidden = rival.follow(past, FAR, packed)
        less = rival.follow(past, 4, packed)
    torch.testing.assert_close(hidden, past.hidden, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(less, past.hidden, atol=1e-2)


def test_one_token_spans_are_the_full_context(past: Past) -> None:
    """Pooling of single tokens keeps them; the first one is there twice then, as sink and as span."""
    kept = MeanKV().keep(past, FAR)
    torch.testing.assert_close(kept.k, past.k)
    assert kept.position[0].tolist() == list(range(FAR))


@pytest.mark.parametrize("ratio", [8, 32])
def test_slots_are_never_exceeded(past: Past, model: LoadedModel, ratio: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where all arms meet: what the queries of each layer can see, beyond the sink and what follows; of those
    that choose per query, what they choose."""
    seen: list[int] = []
    chosen: list[int] = []
    real = layers_module.context_attention

    def counting(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, *rest: object, **named: object):  # type: ignore[no-untyped-def]
        visible = (kv_pos[:, None] >= 0) & (kv_pos[:, None] <= q_pos[:, :, None])
        seen.append(int(visible.sum(-1)[:, -1].max()) - 1 - FOLLOW)  # the last query sees all that follows
        return real(q, k, v, q_pos, kv_pos, *rest, **named)

    monkeypatch.setattr(layers_module, "context_attention", counting)
    layers, slots = past.decoder.config.n_layers, FAR // ratio
    for rival in every_rival(model, ratio):
        seen.clear()
        chosen.clear()
        if isinstance(rival, PerQueryRival):
            choose = rival.choose

            def noting(*arguments: object, choose: Callable[..., Choice | None] = choose) -> Choice | None:
                choice = choose(*arguments)
                chosen.append(0 if choice is None else int((choice.position >= 0).sum(-1).max()))
                return choice

            monkeypatch.setattr(rival, "choose", noting)
        with torch.no_grad():
            assert rival.follow(past, slots, True).shape == (BATCH, FOLLOW, past.decoder.config.embed_dim)
        used = [a + b for a, b in zip(seen[-layers:], chosen or [0] * layers, strict=True)]
        assert 0 < sum(used) <= slots * layers, rival.name
        if not isinstance(rival, Memorizing):
            assert max(used) <= slots, rival.name


@pytest.mark.parametrize("packed", [True, False])
def test_no_rival_sees_targets_ahead(model: LoadedModel, packed: bool) -> None:
    """What predicts the first targets stays as it is when later ones change."""
    ids = torch.randint(0, 200, (2, FAR + FOLLOW), generator=torch.Generator().manual_seed(1))
    other, kept = ids.clone(), 5
    other[:, FAR + RECENT + kept :] = (other[:, FAR + RECENT + kept :] + 7) % 200
    a, b = (read_past(model.decoder, x, FAR, RECENT) for x in (ids, other))
    rivals = [*every_rival(model, 8), Retro(model.tokenizer, 4, 16)]
    for rival in rivals:
        with torch.no_grad():
            x, y = (rival.follow(past, FAR // 8, packed) for past in (a, b))
        same = RECENT + kept
        torch.testing.assert_close(x[:, :same], y[:, :same], rtol=1e-5, atol=1e-5, msg=rival.name)
        assert not torch.allclose(x[:, same:], y[:, same:], atol=1e-3), rival.name


def test_recency_counts_sinks_as_slots(past: Past) -> None:
    assert Recency().keep(past, 5).position.tolist() == [list(range(FAR - 5, FAR))] * BATCH
    assert Recency(4).keep(past, 5).position[0].tolist() == [1, 2, 3, FAR - 2, FAR - 1]
    assert Recency(4).keep(past, 1).position[0].tolist() == [FAR - 1]


def test_random_depends_on_seed_and_window_alone(past: Past) -> None:
    first, again, other = (RandomTokens(seed).keep(past, 9) for seed in (0, 0, 1))
    assert torch.equal(first.position, again.position)
    assert not torch.equal(first.position, other.position)
    assert not torch.equal(first.position[0], first.position[1])
    assert (first.position > 0).all()
    assert (first.position.diff(dim=1) > 0).all()
    alone = read_past(past.decoder, past.ids[1:2], FAR, RECENT)
    assert torch.equal(RandomTokens().keep(alone, 9).position[0], first.position[1])
    where = first.position[1]
    torch.testing.assert_close(first.v[2, 1], past.v[2, 1][:, where])


def test_attention_mass_is_that_of_the_model(past: Past, model: LoadedModel) -> None:
    """Against the model's own attention mass in full context, which sums over all heads."""
    ids = past.ids[:, : FAR + RECENT]
    at = torch.arange(FAR + RECENT).expand(ids.shape)
    before = model.decoder(model.decoder.embed(ids[:, :FAR]), at[:, :FAR], return_mass=True).mass
    whole = model.decoder(model.decoder.embed(ids), at, return_mass=True).mass
    assert before is not None
    assert whole is not None
    expected = whole[:, :, :FAR] - before
    torch.testing.assert_close(past.attention_mass.sum(2), expected, rtol=1e-3, atol=1e-4)


def test_snapkv_keeps_the_most_attended(past: Past) -> None:
    kept = SnapKV().keep(past, 4)
    layer, row, head = 1, 2, 0
    scores = past.attention_mass[layer, row, head].clone()
    scores[0] = -1
    chosen = scores.topk(4).indices.sort().values
    assert torch.equal(kept.k[layer, row, head], past.k[layer, row, head, chosen])
    pooled = torch.stack([scores[max(0, i - 2) : i + 3].max() for i in range(FAR)])
    clustered = SnapKV(5).keep(past, 4)
    best = pooled[1:].topk(4).values.min()
    for key in clustered.k[layer, row, head]:
        place = (past.k[layer, row, head] == key).all(-1).nonzero()[0, 0]
        assert pooled[place] >= best - 1e-6


def test_gist_tokens(past: Past, model: LoadedModel, tmp_path: Path) -> None:
    """Those of a block depend on all text up to its end, on nothing after, and are what is kept."""
    rival = GistTokens(model.decoder.embedding[:2].float(), 32)
    kept = rival.keep(past, 4)
    other = past.ids.clone()
    other[:, 40] = (other[:, 40] + 1) % 200  # in the second block
    changed = rival.keep(read_past(model.decoder, other, FAR, RECENT), 4)
    torch.testing.assert_close(kept.k[:, :, :, :2], changed.k[:, :, :, :2])
    assert not torch.allclose(kept.v[:, :, :, 2:], changed.v[:, :, :, 2:], atol=1e-3)
    rival.save(tmp_path / "tokens.safetensors")
    again = GistTokens.load(tmp_path / "tokens.safetensors", model.decoder)
    assert again.ratio == 16
    assert torch.equal(again.keep(past, 4).k, kept.k)
    with pytest.raises(ValueError, match="slots"):
        rival.keep(past, 3)
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(ModelError, match="gist tokens"):
        GistTokens.load(tmp_path / "bad", model.decoder)


def test_gist_tokens_learn(model: LoadedModel) -> None:
    import random

    import numpy as np

    from mc_runtime.train.corpus import Corpus

    corpus = Corpus("pattern", np.tile(np.arange(40, 71, dtype=np.uint16), 60))
    options = GistTokensOptions(lengths=(64,), near=16, tokens=400, teacher=0.5)
    task = GistTokensTask(model.decoder, [corpus], 1, 32, options)
    (parameter,) = task.parameters.values()
    optimizer = torch.optim.Adam([parameter], lr=0.03)
    losses = []
    for _ in range(12):
        loss, figures = task.loss(random.Random(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(figures["loss"])
    assert losses[-1] < losses[0] - 0.02


def test_pooled_gists_start_as_the_mean(past: Past, model: LoadedModel) -> None:
    net = GistNet.untrained(model.decoder, 32)
    arm = PooledGists("x", net.pool_weights)
    mean = MeanKV().keep(past, 2)
    kept = arm.keep(past, 2)
    torch.testing.assert_close(kept.k, mean.k)
    torch.testing.assert_close(kept.v, mean.v)
    assert kept.position.tolist() == mean.position.tolist() == [[15, 47]] * BATCH
    four = PooledGists("x", [GistPoolWeights.zeros(3, 2, 4, 32, 8)]).keep(past, 8)
    assert four.k.shape == (3, BATCH, 2, 8, 8)
    torch.testing.assert_close(four.k[:, :, :, 5], mean.k[:, :, :, 1])
    for fails in (lambda: arm.keep(past, 3), lambda: MeanKV().keep(past, 3)):
        with pytest.raises(ValueError, match="slots"):
            fails()


def test_lineup(model: LoadedModel) -> None:
    assert len(rivals_for(list(RIVALS), model, 32, 32)) >= len(RIVALS)
    assert rivals_for([], model, 8, 32, [GistTokens(torch.zeros(2, 32), 32)]) == []
    net = GistNet.untrained(model.decoder, 32)
    for ratio, names in ((32, ["pooled gists"]), (8, []), (1024, ["pooled gists, level 2"])):
        assert [arm.name for arm in ours_for(["pooled"], net, "", ratio, 32)] == names
    four = GistPoolWeights.zeros(3, 2, 4, 32, 8)
    fine = GistNet(net.encode_weights, (four, GistPoolWeights.zeros(3, 2, 1, 128, 8)), net.projector, "")
    for ratio, level in ((8, 1), (32, 0), (1024, 2)):
        arms = ours_for(["pooled"], fine, "", ratio, 32)
        assert [len(arm.levels) for arm in arms if isinstance(arm, PooledGists)] == [level] * (level > 0)
    with pytest.raises(InputError, match="rivals"):
        rivals_for(["nobody"], model, 32, 32)
    with pytest.raises(InputError, match="kinds"):
        ours_for(["projected"], net, "", 32, 32)


def test_gists_weigh_what_their_weights_ask_for(model: LoadedModel, past: Past) -> None:
    net = replace(GistNet.untrained(model.decoder, 32), gist_bias=-1e4)
    plain, weighed = ours_for(["pooled"], net, "", 32, 32)
    assert weighed.name == "pooled gists, as a memory weighs them"
    slots = past.far // 32
    nothing = hidden_after(past, None, packed=False)
    torch.testing.assert_close(weighed.follow(past, slots, False), nothing, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.follow(past, slots, False), nothing, rtol=1e-2, atol=1e-2)
