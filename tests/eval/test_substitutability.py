"""The evaluation against what it must be: the same windows for all arms, and reports that say what was measured."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.eval.pasts import Kept, draw_windows, hidden_after, read_past
from mc_runtime.eval.report import Report, Weights, markdown, rows, verdicts
from mc_runtime.eval.rivals.compressive import MeanKV
from mc_runtime.eval.rivals.recency import Recency
from mc_runtime.eval.substitutability import FULL, WINDOW, Comparison, Setting, substitutability
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus

SETTING = Setting(far=64, ratios=(32, 8), recent=8, targets=12, n=7, batch_tokens=300)


@pytest.fixture(scope="module")
def corpus(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    rng, folder = random.Random(0), tmp_path_factory.mktemp("corpus")
    path = folder / "text.txt"
    path.write_text("".join(rng.choice("abcdef \n") for _ in range(4000)))
    return Corpus.open(path, model.tokenizer, folder)


@pytest.fixture(scope="module")
def comparisons(model: LoadedModel, corpus: Corpus) -> list[Comparison]:
    ours = MeanKV()
    ours.name, ours.ours = "stands for ours", True
    lineup = {32: [Recency(), MeanKV(), ours], 8: [Recency(4)]}
    return substitutability(model.decoder, corpus, lineup, SETTING)


def test_windows() -> None:
    corpus = Corpus("n", np.arange(20_000, dtype=np.uint32))
    windows = draw_windows(corpus, 10, 300, 64, seed=1)
    assert windows.shape == (10, 364)
    assert (windows.diff(dim=1) == 1).all()
    longer = draw_windows(corpus, 10, 2000, 64, seed=1)
    assert torch.equal(longer[:, -364:], windows), "the same targets with more past"
    assert (windows[:, 300].diff() > 0).all(), "spread over the text"
    assert not torch.equal(windows, draw_windows(corpus, 10, 300, 64, seed=2))
    small = Corpus("n", np.arange(364, dtype=np.uint16))
    assert draw_windows(small, 3, 300, 64, seed=0)[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="at least 365"):
        draw_windows(small, 3, 301, 64, seed=0)


def test_everything_kept_is_the_full_context(model: LoadedModel) -> None:
    ids = torch.randint(0, 200, (3, 84), generator=torch.Generator().manual_seed(0))
    past = read_past(model.decoder, ids, 64, 8)
    kept = Kept(past.k[:, :, :, 1:], past.v[:, :, :, 1:], torch.arange(1, 64).expand(3, 63))
    for packed in (True, False):
        torch.testing.assert_close(hidden_after(past, kept, packed=packed), past.hidden, rtol=1e-4, atol=1e-4)
    alone = torch.cat((ids[:, :1], ids[:, 64:]), dim=1)
    window = model.decoder(model.decoder.embed(alone), torch.arange(21).expand(3, 21)).hidden[:, 1:]
    torch.testing.assert_close(hidden_after(past, None), window, rtol=1e-4, atol=1e-4)


def test_nll_is_that_of_the_true_next_tokens(model: LoadedModel, corpus: Corpus, comparisons: list[Comparison]) -> None:
    ids = draw_windows(corpus, 7, 72, 12, SETTING.seed)
    decoder = model.decoder
    logits = decoder.logits(decoder(decoder.embed(ids), torch.arange(84).expand(7, 84)).hidden)
    log_p = torch.log_softmax(logits[:, 71:-1], -1).gather(2, ids[:, 72:, None])[..., 0]
    np.testing.assert_allclose(comparisons[0][FULL].nll, -log_p.mean(1).numpy(), atol=1e-4)


def test_arms_do_not_depend_on_each_other(model: LoadedModel, corpus: Corpus, comparisons: list[Comparison]) -> None:
    at32, at8 = comparisons
    assert (at32.text, at32.ratio, at8.ratio) == ("text", 32, 8)
    assert [a.name for a in at32.arms] == [FULL, WINDOW, Recency().name, MeanKV.name, "stands for ours"]
    assert [a.slots for a in at32.arms] == [64, 0, 2, 2, 2]
    assert at8.arms[2].slots == 8
    seen: list[int] = []
    alone = substitutability(
        model.decoder, corpus, {8: [Recency(4)]}, Setting(64, (8,), 8, 12, 7, batch_tokens=10_000), seen.append
    )
    assert seen == [7]
    for name in (FULL, WINDOW, Recency(4).name):
        np.testing.assert_allclose(alone[0][name].nll, at8[name].nll, atol=2e-5)


def test_estimates(comparisons: list[Comparison]) -> None:
    c = comparisons[0]
    assert c.recovery(c[FULL]).value == 1.0
    assert c.recovery(c[WINDOW]).value == 0.0
    assert c.delta(c[FULL]).high == 0.0
    for arm in c.arms:
        assert np.isfinite(arm.nll).all()
        for e in (c.recovery(arm), c.delta(arm)):
            assert e.low <= e.value <= e.high
    (best,) = c.best_rivals
    assert not best.anew
    assert best.nll.mean() == min(a.nll.mean() for a in c.arms if a.kind == "rival")
    nll, recovery = c.ahead(c["stands for ours"], c[MeanKV.name])
    assert (nll.low, nll.high, recovery.low, recovery.high) == (0, 0, 0, 0), "paired: equal arms differ by nothing"


def test_report_round_trip(comparisons: list[Comparison], tmp_path: Path) -> None:
    report = Report("tiny", "abc", "float32", (Weights("a.safetensors", "123"),), SETTING, tuple(comparisons))
    report.save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    again = Report.from_dict(data)
    assert again.to_dict() == data == report.to_dict()
    assert again.setting == SETTING
    assert len(data["comparisons"][0]["arms"][0]["nll"]) == 7
    assert [p["ours"] for p in data["comparisons"][0]["ours_minus_best_rival"]] == ["stands for ours"]
    for broken in ({"schema": "other"}, data | {"comparisons": [{}]}, data | {"setting": {"ratios": [], "x": 1}}):
        with pytest.raises(InputError):
            Report.from_dict(broken)
    text = markdown([again])
    c = comparisons[0]
    assert f"| stands for ours | {c.recovery(c['stands for ours']).text()} |" in text
    (best,) = c.best_rivals
    assert f"| {best.name} | **{c.recovery(best).text()}** |" in text
    assert "8:1: 64 tokens in 8 slots" in text
    assert [row[0].endswith(" *") for row in rows(c)] == [arm is best for arm in c.arms]
    (line,) = verdicts(c)
    assert line.startswith(f"stands for ours - {best.name}: recovery ")


def test_commands(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    text, out, plot = tmp_path / "text.txt", tmp_path / "report.json", tmp_path / "plot.png"
    text.write_text("The quick brown fox jumps over the lazy dog.\n" * 40)
    net, tokens = tmp_path / "net.safetensors", tmp_path / "tokens.safetensors"
    GistNet.untrained(model.decoder, 32).save(net)

    def run(*arguments: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli.app, ["eval", *map(str, arguments)], catch_exceptions=code != 0)
        assert (result.exit_code == 0) == (code == 0), result.output
        return result.output if code == 0 else str(result.exception)

    run("gist-tokens", text, "--run", tmp_path / "run", "--out", tokens, "--steps", 1)
    arguments = ["substitutability", text, "--far", 64, "--recent", 8, "--targets", 12, "-n", 4, "--out", out]
    run(*arguments, "--gistnet", net, "--ratio", 32, "--ratio", 8, "--gist-tokens", tokens, "--plot", plot)
    report = Report.from_dict(json.loads(out.read_text()))
    at32, at8 = report.comparisons
    assert {a.kind for a in at32.arms} == {"bound", "rival", "ours"}
    assert {a.kind for a in at8.arms} == {"bound", "rival"}, "a net of one gist a block has none at 8:1"
    assert len(at32.arms) >= 16
    assert report.weights[0].file == "net.safetensors"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [p["anew"] for p in report.to_dict()["comparisons"][0]["ours_minus_best_rival"]] == [False, True]
    table = run("table", out, out)
    assert table.count("| recency |") == 4
    assert "expected some of" in run(*arguments, "--kinds", "other", code=2)
    assert "expected a divisor of 32" in run(*arguments, "--ratio", 7, code=2)
    assert "expected a positive multiple" in run("substitutability", text, "--far", 65, code=2)
    assert "not a readable report" in run("table", text, code=2)
