"""Conversations over several topics: what they ask, what comes in between, and how turns are counted."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.config import MemoryConfig
from mc_runtime.errors import InputError
from mc_runtime.eval.pivot.plan import Plan, Planner
from mc_runtime.eval.pivot.report import rows, to_json
from mc_runtime.eval.pivot.run import Record, Setting, measure, plans
from mc_runtime.eval.pivot.topics import DOMAINS, FACTS, draw_topics
from mc_runtime.eval.readers import MemoryStore, Question, make_readers
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus


@pytest.fixture
def corpus(model: LoadedModel, tmp_path: Path) -> Corpus:
    rng = random.Random(0)
    words = ["sea", "wind", "house", "night", "rain", "bread", "hill", "stone"]
    path = tmp_path / "text.txt"
    path.write_text("".join(" ".join(rng.choices(words, k=8)).capitalize() + ". " for _ in range(300)))
    return Corpus.open(path, model.tokenizer, tmp_path / "tokens")


@pytest.fixture
def planner(model: LoadedModel, corpus: Corpus) -> Planner:
    return Planner(model.tokenizer, [corpus], topics=4, turns=3, candidates=5)


def evidence(model: LoadedModel, plan: Plan, question: Question, update: tuple[int, ...] | None) -> str:
    (span,) = question.evidence
    source = plan.history.ids if span.text == 0 else np.asarray(update)
    return model.tokenizer.decode(source[span.start : span.stop].tolist())


def test_topics_differ() -> None:
    topics = draw_topics(random.Random(0), 12)
    assert len({topic.name for topic in topics}) == 12
    assert {len(topic.facts) for topic in topics} == {FACTS}
    for topic in topics:
        for fact in topic.facts:
            assert topic.name in fact.statement
            assert fact.value in fact.statement
            assert topic.name in fact.attribute.prompt.format(topic=topic.name)
    for attribute in (a for domain in DOMAINS for a in domain.attributes):
        values = [f.value for t in topics for f in t.facts if f.attribute is attribute]
        assert len(set(values)) == len(values)
        assert all("{value}" in said for said in (*attribute.statements, *attribute.updates))


def test_conversations(model: LoadedModel, planner: Planner) -> None:
    plan = planner.make(random.Random(1), 12_000, 3)
    assert len(plan.history.ids) == 12_000
    assert len(plan.conversations) == 3
    for turns in plan.conversations:
        kinds = [turn.kind for turn in turns]
        assert kinds == ["first", "stay", "stay", "pivot", "stay", "stay", "return", "updated", "stay"]
        told = [i for i, turn in enumerate(turns) if turn.before is not None]
        assert told == [4]
        update = turns[4].before
        for turn in turns:
            said = evidence(model, plan, turn.question, update)
            assert turn.question.answers[0] in said
            assert turn.question.candidates[0] == " " + turn.question.answers[0]
            assert len(set(turn.question.candidates)) == 5
        first, changed = turns[0].question, turns[7].question
        assert first.prompt == changed.prompt
        assert first.answers != changed.answers
        assert changed.stale == 1
        assert changed.candidates[1] == first.candidates[0]
        assert [turn.question.stale for i, turn in enumerate(turns) if i != 7] == [None] * 8
        asked = [turn.question.prompt for turn in turns]
        assert len(set(asked[:3] + asked[6:7])) == 4
    assert plan.conversations[0][3].question.evidence != plan.conversations[1][3].question.evidence
    again = planner.make(random.Random(1), 12_000, 3)
    assert again.conversations == plan.conversations


def test_topics_stand_in_their_order_over_the_whole_history(planner: Planner) -> None:
    plan = planner.make(random.Random(1), 12_000, 4)
    starts = [min(t.question.evidence[0].start for t in turns[:3]) / 12_000 for turns in plan.conversations]
    assert starts == sorted(starts)
    assert starts[0] < 0.25
    assert starts[-1] > 0.7


def test_what_does_not_fit(model: LoadedModel, corpus: Corpus, planner: Planner) -> None:
    with pytest.raises(InputError, match="too few"):
        planner.make(random.Random(0), 2000, 1)
    with pytest.raises(InputError, match="turns"):
        Planner(model.tokenizer, [corpus], topics=4, turns=FACTS, candidates=5)
    with pytest.raises(InputError, match="topics"):
        Planner(model.tokenizer, [corpus], topics=1, turns=2, candidates=5)


def test_every_reader_holds_the_same_conversations(model: LoadedModel, corpus: Corpus, tmp_path: Path) -> None:
    config = MemoryConfig(
        budget=768, block_size=8, recent_tokens=24, ingest_chunk=256, ingest_window=64, system_prompt="be brief"
    )
    store = MemoryStore(tmp_path / "work", model, config)
    planner = Planner(model.tokenizer, [corpus], topics=2, turns=2, candidates=3, longest=4)
    setting = Setting(size=2600, n=2, topics=2, turns=2, candidates=3)
    assert [len(plan.conversations) for plan in plans(planner, replace(setting, n=3))] == [2, 1]
    readers = make_readers(["oracle", "bm25", "recency"], store)
    records = list(measure(planner, readers, setting))
    store.close()
    assert len(records) == 2 * 6 * 3
    assert sorted(p.name for p in store.folder.iterdir() if "part" in p.name or "tmp" in p.name) == []
    asked = [[(r.history, r.conversation, r.turn, r.prompt) for r in records if r.reader == x.name] for x in readers]
    assert asked[0] == asked[1] == asked[2]
    assert all(r.slots <= 768 for r in records)
    ours = [r for r in records if r.reader == "memory, oracle"]
    assert all(r.seen == 1.0 and r.refocus is not None and r.refocus > len(r.prompt) for r in ours)
    assert any(r.swaps for r in ours)
    assert not any(r.swaps for r in records if r.reader != "memory, oracle")
    found = {(row.reader, row.kind): row for row in rows(records)}
    assert found["memory, oracle", "pivot"].generated.n == 2
    assert found["memory, oracle", "stay"].generated.n == 4
    assert found["memory, oracle", "updated"].refocused.value == 1.0
    assert found["memory, oracle", "updated"].stale_ranked is not None
    assert found["memory, oracle", "first"].stale_ranked is None
    assert found["recency (StreamingLLM)", "first"].refocused.value < 1
    data = json.loads(json.dumps(to_json({}, records)))
    assert [Record(**turn) for turn in data["turns"]] == records
    assert len(data["rows"]) == 3 * 5


def test_command(model: LoadedModel, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    out, picture = tmp_path / "report.json", tmp_path / "report.png"
    arguments = [
        "eval", "pivot", str(tmp_path / "text.txt"), "--size", "4k", "--readers", "none,bm25", "-n", "1",
        "--topics", "2", "--refresh", "tail", "--work", str(tmp_path / "work"), "--out", str(out),
        "--plot", str(picture),
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert len(report["turns"]) == 12
    assert report["setting"]["refresh"] == "tail"
    assert {row["kind"] for row in report["rows"]} == {"first", "stay", "pivot", "return", "updated"}
    assert picture.stat().st_size > 10_000
    table = CliRunner().invoke(cli.app, ["eval", "table", str(out)], catch_exceptions=False).output.splitlines()
    assert table[2].startswith("| reader | first | stay | pivot | return | updated | old value said | swaps per turn |")
    assert [line.split(" | ")[0] for line in table[4:]] == ["| no text", "| BM25 append (RAG)"]
    with pytest.raises(InputError, match="readers"):
        CliRunner().invoke(cli.app, ["eval", "pivot", "x", "--readers", "retro"], catch_exceptions=False)
    with pytest.raises(InputError, match="refresh: expected one of none, tail, top, text, full, got 'half'"):
        CliRunner().invoke(cli.app, [*arguments, "--refresh", "half"], catch_exceptions=False)
