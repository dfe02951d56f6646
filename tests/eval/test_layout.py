"""`mc eval layout`: the same points for all arms, nothing left behind, swaps as counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checks import check_session, counted_forwards, words
from typer.testing import CliRunner

from mc_runtime import Session, cli
from mc_runtime.errors import InputError
from mc_runtime.eval.contexts import follow, mean_nll
from mc_runtime.eval.layout import (
    COARSEST,
    LEVEL_ONE,
    RECENCY,
    WINDOW,
    LayoutResult,
    LayoutSetting,
    arm_of,
    measure_layouts,
    plain_arms,
    plain_window,
    read_on,
)
from mc_runtime.eval.layout_report import against, draw, rows, swap_rows, swaps, to_dict, with_overall
from mc_runtime.eval.pasts import draw_windows
from mc_runtime.eval.swaps import Cycle, Residency, Snapshot, changed_share, changes, residency
from mc_runtime.focus import AttentionPolicy, FocusPolicy, FocusView, RecencyPolicy, Utilities
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.turns import Turn

K = 8
SETTING = LayoutSetting(history=420, budget=256, recent=24, targets=12, every=64, points=2, cycles=3, n=3, block_size=K)


class Nothing:
    """Opens nothing for its own sake."""

    needs_mass = False

    def utilities(self, view: FocusView) -> Utilities:
        return {}


@pytest.fixture(scope="module")
def corpus(model: LoadedModel) -> Corpus:
    return Corpus("words", np.array(model.tokenizer.encode(words(2000)), np.uint16))


@pytest.fixture(scope="module")
def measured(model: LoadedModel, corpus: Corpus) -> LayoutResult:
    result = LayoutResult(corpus.name)
    policies: dict[str, FocusPolicy] = {"recency": RecencyPolicy(), "attention": AttentionPolicy()}
    ticks: list[int] = []
    measure_layouts(model, corpus, policies, SETTING, result, progress=ticks.append)
    assert ticks == [1, 1, 1]
    return result


@pytest.fixture
def session(model: LoadedModel, tmp_path: Path) -> Iterator[Session]:
    with Session.open(tmp_path / "memory", model, config=SETTING.config(), policy=RecencyPolicy()) as session:
        session.ingest(words(400))
        yield session


# -- swaps


def nodes(*index: int, level: int = 1) -> frozenset[tuple[int, int]]:
    return frozenset((level, i) for i in index)


def test_changes_between_layouts() -> None:
    start = Snapshot(nodes(0, 3, 9), {1: 10})
    roomy = Snapshot(nodes(0, 9, 12), {1: 13})  # 3 made room; 10 to 12 came in, 12 as pinned text
    end = Snapshot(nodes(0, 5, 11, 13), {1: 14})  # 5 and 11 opened, 9 and 12 closed; 13 has only just been read
    opened, closed = changes(start, roomy, end)
    assert opened == nodes(5, 11)
    assert closed == nodes(3, 9, 12)
    assert changes(start, start, start) == (frozenset(), frozenset())


def test_swaps_of_a_scripted_run() -> None:
    def cycle(opened: frozenset[Any] = frozenset(), closed: frozenset[Any] = frozenset(), filling: bool = False):
        return Cycle(opened, closed, 160, 7, filling)

    run = [
        cycle(nodes(1, 2) | nodes(0, level=2), filling=True),  # 0
        cycle(nodes(3), nodes(40)),  # 1: 40 was open before
        cycle(),  # 2
        cycle(nodes(4), nodes(1)),  # 3: 1 stayed 3 cycles
        cycle(nodes(1), nodes(3, 2)),  # 4: 3 stayed 3, 2 stayed 4
        cycle(),  # 5: 4 and 1 are still open
    ]
    stay = residency([run])
    assert stay == Residency(faced=3 + 3 + 4 + 2 + 1, closed=3, shortest=3)
    assert stay.cycles == pytest.approx(13 / 3)
    assert residency([run, run]) == Residency(26, 6, 3)
    assert residency([[cycle(nodes(1)), cycle()]]).cycles is None
    assert changed_share(run[4], 32) == pytest.approx(3 / 5)
    found = swaps([run], 32)
    assert found["cycles"] == 5
    assert found["changed"]["value"] == pytest.approx((2 + 0 + 2 + 3 + 0) / 5 / 5)
    assert found["recomputed"] == 7
    assert found["residency"] == pytest.approx(13 / 3)
    only_filling = swaps([run[:1]], 32)
    assert only_filling["changed"] is None
    assert only_filling["residency"] is None


def test_snapshot_of_a_context(session: Session) -> None:
    assert Snapshot.of(session.context) == Snapshot(frozenset(), {1: 0, 2: 0})
    with torch.inference_mode():
        session.focus.make_room(session.context, K)
    snapshot = Snapshot.of(session.context)
    assert snapshot.reach == {level: session.tree.count(level) for level in (1, 2)}
    shown = session.context.entries
    tokens = set((shown.index[shown.levels == 0] // K).tolist())
    assert {i for level, i in snapshot.expanded if level == 1} == tokens & set(range(session.tree.count(1)))


# -- points


def test_points(measured: LayoutResult, model: LoadedModel, corpus: Corpus) -> None:
    assert [(p.history, p.length) for p in measured.points] == [(0, 420), (0, 484), (1, 420)]
    head = len(model.chat.system_ids(SETTING.config().system_prompt))
    for point in measured.points:
        assert set(point.nll) == set(point.slots) == {"recency", "attention", COARSEST, LEVEL_ONE, RECENCY, WINDOW}
        assert all(0 < nll < 30 for nll in point.nll.values())
        used = {arm: sum(levels.values()) for arm, levels in point.slots.items()}
        assert used[RECENCY] == SETTING.slots == 248
        assert used[WINDOW] == head + 24
        assert used[COARSEST] <= used[LEVEL_ONE]
        assert max(used.values()) <= SETTING.slots
        assert used["recency"] > used[LEVEL_ONE]
    assert [len(run) for run in measured.cycles["attention"]] == [6, 3]
    assert [cycle.filling for cycle in measured.cycles["recency"][0]] == [True] * 3 + [False] * 3
    assert any(cycle.opened for run in measured.cycles["recency"] for cycle in run)
    # The plain window against a computation by hand.
    row = draw_windows(corpus, 2, 484, 12, SETTING.seed)[0].tolist()
    history = model.chat.system_ids(SETTING.config().system_prompt) + row[:484]
    ids = torch.tensor([history[:head] + history[head - 248 :] + row[484:]])
    with torch.inference_mode():
        hidden = model.decoder(model.decoder.embed(ids), torch.arange(260)[None]).hidden[0]
        nll = F.cross_entropy(model.decoder.logits(hidden[247:259]), ids[0, 248:])
    assert measured.points[1].nll[RECENCY] == pytest.approx(float(nll), rel=1e-5)


def test_window_takes_the_slots_stated(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.arange(100)
    with counted_forwards(monkeypatch) as counts:
        some = plain_window(model.decoder, tokens, 5, 40, [1, 2, 3])
        everything = plain_window(model.decoder, tokens, 5, 400, [1, 2, 3])
    assert counts == [42, 102]
    kept = np.concatenate((tokens[:5], tokens[65:]))
    assert some == plain_window(model.decoder, kept, 0, 40, [1, 2, 3]) != everything


def test_a_measuring_point_leaves_nothing_behind(session: Session) -> None:
    read_on(session, np.asarray(session.model.tokenizer.encode(words(24, seed=2)), np.int64))
    context, tree = session.context, session.tree
    before = (
        context.cache.data.clone(), context.cache.pos.clone(), context.entries, context.slots.clone(),
        json.dumps(session.focus.state()), tree.length, context.counts, tree.count_documents(),
        {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in session.path.rglob("*")},
    )  # fmt: skip
    targets = [3, 1, 4, 1, 5]
    nll, slots = arm_of(context, targets)
    assert sum(slots.values()) == context.used <= SETTING.slots
    arms = plain_arms(session, targets, SETTING)
    assert arms[WINDOW][0] != nll
    assert arm_of(context, targets) == (nll, slots)
    after = (
        context.cache.data, context.cache.pos, context.entries, context.slots, json.dumps(session.focus.state()),
        tree.length, context.counts, tree.count_documents(),
        {p.name: (p.stat().st_size, p.stat().st_mtime_ns) for p in session.path.rglob("*")},
    )  # fmt: skip
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a is b or a == b
    assert not context.pending
    check_session(session)


def test_reading_on_is_what_decoding_does(model: LoadedModel, tmp_path: Path) -> None:
    """The same tokens, one by one through a turn, end in the same layout."""
    config = replace(SETTING.config(), refresh_decode="full")
    ids = model.tokenizer.encode(words(40, seed=9))
    layouts = []
    for how in ("read on", "decode"):
        with Session.open(tmp_path / how, model, config=config, policy=AttentionPolicy()) as session:
            session.ingest(words(400))
            if how == "read on":
                cycles = read_on(session, np.asarray(ids, np.int64))
                assert len(cycles) == 5
                assert session.tree.tokens()[-40:].tolist() == ids
                check_session(session)
            else:
                context, focus = session.context, session.focus
                with torch.inference_mode():
                    focus.make_room(context, K)

                def add(transaction: Any, start: int, stop: int) -> None:
                    transaction.add_document(
                        kind="document", title="", source=None, start=start, stop=stop, ingest="contextual"
                    )

                def commit(context: Any, builder: Any = session.builder) -> None:
                    context.commit(builder, add)

                turn = Turn(model, context, focus, commit)
                for token in ids:
                    turn.step(token)
                assert turn.stats.expanded + turn.stats.collapsed > 0
            layouts.append(session.context.entries)
    assert np.array_equal(layouts[0].levels, layouts[1].levels)
    assert np.array_equal(layouts[0].index, layouts[1].index)


class Best:
    """Opens the one block whose opening makes known targets likeliest, by trying each."""

    needs_mass = False

    def __init__(self, targets: list[int]) -> None:
        self.targets, self.gain = targets, 0.0

    def utilities(self, view: FocusView) -> Utilities:
        context, opened = view.context, view.expanded[1]
        base = mean_nll(context.decoder, follow(context, self.targets), self.targets)
        gains = {}
        for block in context.entries.index[context.entries.levels == 1].tolist():
            branch = context.fork(context.cache.widened(400))
            branch.relayout(view.expanded | {1: np.union1d(opened, [block])})
            gains[block] = base - mean_nll(context.decoder, follow(branch, self.targets), self.targets)
        best = max(gains, key=lambda block: gains[block])
        self.gain = gains[best]
        return {1: (np.array([best]), np.array([self.gain]))}


@pytest.mark.parametrize("refresh", ["none", "full"])
def test_opening_what_helps_is_seen(model: LoadedModel, corpus: Corpus, refresh: Any) -> None:
    """What the best block gains where it is chosen is what is measured, and nothing else of the layout changes."""
    setting = replace(SETTING, n=1, points=1, cycles=1, refresh=refresh, seed=2)
    targets = draw_windows(corpus, 1, 420, 12, setting.seed)[0, 420:].tolist()
    best, result = Best(targets), LayoutResult(corpus.name)
    measure_layouts(model, corpus, {"best": best, "nothing": Nothing()}, setting, result)
    (point,) = result.points
    assert best.gain > 0.05
    assert point.nll["nothing"] - point.nll["best"] == pytest.approx(best.gain, abs=1e-3)
    assert point.slots["best"][0] == point.slots["nothing"][0] + K
    assert len(result.cycles["best"][0][0].opened) == 1
    assert not result.cycles["nothing"][0][0].opened


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"every": 20}, "every: expected at least the 24 tokens of 3 cycles"),
        ({"history": 24}, "history: expected more than the 24"),
        ({"cycles": 0}, "cycles: expected at least 1"),
        ({"refresh": "some"}, "refresh: expected one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(SETTING, **bad)


def test_more_slots_than_positions_are_refused(model: LoadedModel, corpus: Corpus) -> None:
    with pytest.raises(InputError, match="budget: expected at most 4084 slots"):
        measure_layouts(model, corpus, {}, replace(SETTING, budget=4085), LayoutResult("none"))


# -- reports


def test_report(measured: LayoutResult, tmp_path: Path) -> None:
    estimate = against(measured, "attention")
    differences = [p.nll["attention"] - p.nll[RECENCY] for p in measured.points]
    assert estimate.value == pytest.approx(np.mean(differences))
    assert min(differences) <= estimate.low <= estimate.high <= max(differences)
    assert estimate.n == 3
    other = LayoutResult("other", [replace(p, nll=p.nll | {RECENCY: 0.0}) for p in measured.points[:2]])
    total = with_overall([measured, LayoutResult("empty"), other])
    assert [r.text for r in total] == ["words", "other", "all texts"]
    assert len(total[-1].points) == 5
    assert with_overall([measured]) == [measured]
    lines = {line[1]: line for line in rows(measured)}
    assert lines[RECENCY][2:] == ("248", "248", f"{np.mean([p.nll[RECENCY] for p in measured.points]):.3f}", "")
    assert lines["attention"][-1] == estimate.text(3)
    # Left out at one point: no pair, no row.
    first = measured.points[0]
    lacking = replace(first, nll={name: x for name, x in first.nll.items() if name != LEVEL_ONE})
    assert LEVEL_ONE in lines
    assert set(lines) - {line[1] for line in rows(replace(measured, points=[first, lacking]))} == {LEVEL_ONE}
    assert [line[1] for line in swap_rows(measured, K)] == ["recency", "attention"]
    report = json.loads(json.dumps(to_dict({"model": "tiny"}, [measured, other], SETTING)))
    assert report["schema"] == "megacontext/layout/1"
    assert [p["nll"] for p in report["texts"][0]["points"]] == [p.nll for p in measured.points]
    assert len(report["texts"][0]["cycles"]["recency"][0]) == 6
    assert "points" not in report["texts"][-1]
    assert not any(math.isnan(e["value"]) for e in report["texts"][-1]["against_recency"].values())
    draw([measured, other], tmp_path / "plot.png", "tiny")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_command(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    text, lens = tmp_path / "text.txt", tmp_path / "lens.safetensors"
    text.write_text(words(2000))
    LensNet.untrained(model.decoder, width=32, n_heads=2, ffn_dim=32, head_dim=16).save(lens)
    base = [
        "eval", "layout", text, "--history", 900, "--budget", 384, "--recent", 32, "--targets", 4, "--every", 64,
        "--points", 2, "--cycles", 2, "-n", 2,
    ]  # fmt: skip

    def run(*more: object) -> Any:
        return CliRunner().invoke(cli.app, [*map(str, base), *map(str, more)], env={"COLUMNS": "200"})

    names = "lensnet+retrieval,recency"
    result = run("--lensnet", lens, "--policies", names, "--out", tmp_path / "r.json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in (*names.split(","), RECENCY, WINDOW, COARSEST))
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["policies"] == names.split(",")
    assert [p["length"] for p in report["texts"][0]["points"]] == [900, 964]
    assert (tmp_path / "p.png").exists()
    table = CliRunner().invoke(cli.app, ["eval", "table", str(tmp_path / "r.json")]).output.splitlines()
    assert table[2] == "| arm | text | changed per block | residency, cycles |"
    assert {line.split(" | ")[0].removeprefix("| ") for line in table[4:]} == {
        *names.split(","),
        WINDOW,
        COARSEST,
        LEVEL_ONE,
    }
    for bad, message in (
        (("--policies", "lensnet"), "lensnet needs trained weights"),
        (("--policies", "nosuch"), "policy: expected one of"),
        (("--policies", "recency", "--lensnet", lens), "lensnet: expected one of"),
        (("--cycles", 3), "every: expected at least"),
    ):
        failed = run(*bad)
        assert isinstance(failed.exception, InputError), failed.output
        assert message in str(failed.exception)
