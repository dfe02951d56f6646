"""Staleness against what must hold: `full` is the layout assembled anew, the cheaper modes run less and drift."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import words
from typer.testing import CliRunner

from mc_runtime import Session, cli
from mc_runtime.errors import BudgetError, InputError
from mc_runtime.eval.contexts import coarsest, follow, slots_of
from mc_runtime.eval.staleness import (
    ANEW,
    MODES,
    Reading,
    StalenessSetting,
    edit_walk,
    editable,
    full_layout,
    kl_rows,
    staleness,
)
from mc_runtime.eval.staleness_report import draw, estimates, rows, to_dict, with_overall
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus

SETTING = StalenessSetting(
    history=300, budget=256, recent=24, targets=12, edits=(1, 5), n=2, block_size=8, tail=16, share=0.25
)


@pytest.fixture(scope="module")
def corpus(model: LoadedModel) -> Corpus:
    ids = np.array(model.tokenizer.encode(words(3000)), np.uint16)
    return Corpus("words", ids)


@pytest.fixture(scope="module")
def readings(model: LoadedModel, corpus: Corpus) -> list[Reading]:
    return staleness(model, corpus, SETTING)


@pytest.fixture
def session(model: LoadedModel, tmp_path: Path) -> Any:
    with Session.open(tmp_path / "memory", model, budget=256, recent_tokens=24, block_size=8) as session:
        session.ingest(words(300))
        yield session


def test_divergence() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    expected = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert float(kl_rows(p.log() + 3, q.log() - 1)) == pytest.approx(expected)
    assert float(kl_rows(q.log(), p.log())) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    both = torch.cat((p, q)).log()
    assert kl_rows(both, both).abs().max() < 1e-12


def test_walk_starts_full_and_changes_one_block_at_a_time(session: Session) -> None:
    rng = np.random.default_rng(0)
    most = session.config.budget - 8
    used = {slots_of(session.context, full_layout(rng, session)) for _ in range(20)}
    assert len(used) == 2
    assert most - 7 < max(used) <= most
    assert min(used) == max(used) - 7
    start = full_layout(rng, session)
    pinned = coarsest(session)[1]
    assert len(pinned)
    before, sizes = start, set()
    for layout in edit_walk(rng, session, start, 40):
        changed = np.setxor1d(layout[1], before[1])
        assert len(changed) == 1
        assert not np.isin(changed, pinned).any()
        assert np.isin(pinned, layout[1]).all()
        assert all(np.array_equal(layout[level], start[level]) for level in start if level > 1)
        sizes.add(slots_of(session.context, layout))
        before = layout
    assert max(sizes) <= most
    assert len(sizes) > 1
    assert not np.isin(editable(session), pinned).any()


def test_what_is_asked_of_a_context_leaves_it_as_it_was(session: Session) -> None:
    context = session.context
    context.assemble(coarsest(session))
    data, entries, tokens = context.cache.data.clone(), context.entries, session.tree.length
    targets = [5, 6, 7, 8]
    hidden = follow(context, targets)
    assert torch.equal(context.cache.data, data)
    assert context.entries is entries
    assert not context.pending
    assert session.tree.length == tokens
    # The newest token, run anew and alone, and then the targets: the same as all of them in one go.
    branch = context.fork(context.cache.widened(context.cache.capacity + 8))
    with torch.inference_mode():
        torch.testing.assert_close(hidden[1:], branch.append(targets).hidden[0, :-1], rtol=1e-4, atol=1e-4)
    assert torch.equal(follow(context, targets[:1]), hidden[:1])


def test_readings(readings: list[Reading]) -> None:
    assert len(readings) == SETTING.n * len(SETTING.edits) * (len(MODES) + 1)
    by = {(r.context, r.edits, r.mode): r for r in readings}
    for context in range(SETTING.n):
        for edits in SETTING.edits:
            none, tail, top, full = (by[context, edits, mode] for mode in ("none", "tail", "top", "full"))
            anew = by[context, edits, ANEW]
            assert (anew.kl, anew.agrees) == (0.0, 1.0)
            assert abs(full.kl) < 1e-9
            assert full.agrees == 1.0
            assert full.right == anew.right
            assert min(none.kl, tail.kl, top.kl) > 1e-9
            assert none.recomputed < tail.recomputed < full.recomputed < anew.recomputed
            assert none.recomputed <= top.recomputed < full.recomputed
            assert none.recomputed * edits % 8 == 0, "whole blocks that were opened, and nothing else"
            for one in (none, tail, top, full, anew):
                assert one.right * SETTING.targets == pytest.approx(round(one.right * SETTING.targets))
    mean = {mode: np.mean([r.kl for r in readings if (r.mode, r.edits) == (mode, 5)]) for mode in MODES}
    assert mean["tail"] < mean["none"]


def test_the_same_seed_gives_the_same_readings(model: LoadedModel, corpus: Corpus, readings: list[Reading]) -> None:
    one = staleness(model, corpus, replace(SETTING, n=2, edits=(1,)))
    assert one == [r for r in readings if r.edits == 1]
    other = staleness(model, corpus, replace(SETTING, edits=(1,), seed=2))
    assert other != one


def test_a_budget_without_room_is_refused(model: LoadedModel, corpus: Corpus) -> None:
    with pytest.raises(BudgetError, match="budget: 150 slots hold the gists of"):
        staleness(model, corpus, replace(SETTING, budget=150))
    with pytest.raises(InputError, match="expected a text of at least"):
        staleness(model, corpus, replace(SETTING, history=2999))


def test_report(readings: list[Reading], tmp_path: Path) -> None:
    found = estimates(readings)
    mine = [r.kl for r in readings if (r.mode, r.edits) == ("none", 5)]
    assert found[5, "none"]["kl"].value == pytest.approx(np.mean(mine))
    assert found[5, "none"]["kl"].n == SETTING.n
    texts = {"one": readings, "two": readings[: len(readings) // 2], "three": []}
    assert list(with_overall(texts)) == ["one", "two", "all texts"]
    assert list(with_overall({"one": readings})) == ["one"]
    lines = rows("one", readings)
    assert [line[1:3] for line in lines] == [(str(e), m) for e in SETTING.edits for m in (ANEW, *MODES)]
    report = json.loads(json.dumps(to_dict({"model": "tiny"}, texts, SETTING)))
    assert report["schema"] == "megacontext/staleness/1"
    assert [Reading(**r) for r in report["texts"][0]["readings"]] == readings
    assert "readings" not in report["texts"][-1]
    draw(texts, tmp_path / "plot.png", "tiny")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_command(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    text = tmp_path / "text.txt"
    text.write_text(words(3000))
    base = ["eval", "staleness", text, "--history", 640, "--budget", 512, "--recent", 32, "--targets", 4, "-n", 1]

    def run(*more: object) -> Any:
        return CliRunner().invoke(cli.app, [*map(str, base), *map(str, more)], env={"COLUMNS": "200"})

    result = run("--edits", "2,1", "--out", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert all(mode in result.output for mode in MODES)
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["setting"]["edits"] == [1, 2]
    assert (tmp_path / "p.png").exists()
    table = CliRunner().invoke(cli.app, ["eval", "table", str(tmp_path / "r.json")]).output.splitlines()
    assert table[2] == "| edits | refresh | text |"
    assert len(table) == 4 + 2 * len(MODES)
    for bad, message in ((("--edits", "1,x"), "edits: expected numbers"), (("--edits", "0"), "at least 1")):
        failed = run(*bad)
        assert isinstance(failed.exception, InputError)
        assert message in str(failed.exception)
