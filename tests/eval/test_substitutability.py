"""Arms of the evaluation against what they must be."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.eval.pasts import Kept, Past, hidden_after, read_past
from mc_runtime.eval.rivals.pooled import mean_pooling
from mc_runtime.eval.rivals.recency import Recency
from mc_runtime.eval.rivals.snapkv import SnapKV, attention_mass
from mc_runtime.eval.substitutability import FULL, WINDOW, Setting, substitutability
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus

FAR, RECENT, TARGETS = 64, 8, 12


@pytest.fixture
def past(model: LoadedModel) -> Past:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 200, (3, FAR + RECENT + TARGETS), generator=generator)
    return read_past(model.decoder, ids, FAR, RECENT)


def test_everything_kept_is_the_full_context(past: Past) -> None:
    position = torch.arange(FAR).expand(3, FAR)
    for packed in (True, False):
        hidden = hidden_after(past, Kept(past.k, past.v, position), packed=packed, sink=False)
        torch.testing.assert_close(hidden, past.hidden[:, FAR:], rtol=1e-4, atol=1e-4)


def test_recency_keeps_the_last_and_the_sink(past: Past, model: LoadedModel) -> None:
    kept = Recency().keep(past, 5)
    assert kept.position.tolist() == [list(range(FAR - 5, FAR))] * 3
    assert torch.equal(kept.k, past.k[:, :, :, -5:])
    # the window alone: only the sink before the recent tokens
    ids = torch.cat((past.ids[:, :1], past.ids[:, FAR:]), dim=1)
    alone = model.decoder(model.decoder.embed(ids), torch.arange(ids.shape[1]).expand(ids.shape)).hidden[:, 1:]
    torch.testing.assert_close(hidden_after(past, None), alone, rtol=1e-4, atol=1e-4)


def test_mean_pooling(past: Past) -> None:
    kept = mean_pooling(3, 2, 8, 32).keep(past, 2)
    torch.testing.assert_close(kept.k[:, :, :, 1], past.k[:, :, :, 32:64].mean(3))
    assert kept.position.tolist() == [[15, 47]] * 3
    with pytest.raises(ValueError, match="expected 2 gists"):
        mean_pooling(3, 2, 8, 32).keep(past, 3)


def test_attention_mass_is_that_of_the_model(past: Past, model: LoadedModel) -> None:
    """Against the op's own mass: the share of a query that falls on far tokens, rescaled to one."""
    mass = attention_mass(past)
    assert mass.shape == (3, 3, 2, FAR)
    torch.testing.assert_close(mass.sum(-1), torch.full((3, 3, 2), 2.0 * RECENT))
    kept = SnapKV().keep(past, 4)
    layer, row, head = 1, 2, 0
    scores = mass[layer, row, head].clone()
    scores[0] = -1
    chosen = scores.topk(4).indices.sort().values
    assert torch.equal(kept.k[layer, row, head], past.k[layer, row, head, chosen])
    assert torch.equal(kept.v[layer, row, head], past.v[layer, row, head, chosen])


def test_arms(model: LoadedModel, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("".join(rng.choice("abcdef \n") for _ in range(4000)))
    corpus = Corpus.open(path, model.tokenizer, tmp_path)
    setting = Setting(far=64, slots=2, recent=8, targets=12, n=7, batch=3)
    seen: list[int] = []
    arms = substitutability(model.decoder, corpus, [Recency(), mean_pooling(3, 2, 8, 32)], setting, seen.append)
    assert seen == [3, 3, 1]
    by_name = {arm.name: arm for arm in arms}
    assert by_name[FULL].recovery.value == 1.0
    assert by_name[WINDOW].recovery.value == 0.0
    assert all(len(arm.nll) == 7 and np.isfinite(arm.nll).all() for arm in arms)
    again = substitutability(model.decoder, corpus, [Recency()], Setting(64, 2, 8, 12, 7, batch=7))
    np.testing.assert_allclose(again[0].nll, by_name[FULL].nll, rtol=1e-4)


def test_command(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    text, out = tmp_path / "text.txt", tmp_path / "report.json"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    arguments = ["eval", "substitutability", str(text), "--far", "64", "-n", "4", "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert set(report["texts"]["text"]) >= {FULL, WINDOW, Recency.name}
    assert len(report["texts"]["text"][FULL]["nll"]) == 4
