"""Needles stand where they were drawn, questions fit them, and replies are scored as they must be."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.config import MemoryConfig
from mc_runtime.errors import InputError
from mc_runtime.eval.needle.case import Case, Task
from mc_runtime.eval.needle.facts import invented_names
from mc_runtime.eval.needle.haystack import NOISE, draw_depths, history_of, noise, plant, prose, sentence_ends
from mc_runtime.eval.needle.planted import InProse, Passkey
from mc_runtime.eval.needle.report import rows, to_json
from mc_runtime.eval.needle.run import Record, Setting, cases, measure
from mc_runtime.eval.needle.scoring import generated, ranked_first, share
from mc_runtime.eval.needle.tasks import RULER, TASKS, make_tasks
from mc_runtime.eval.readers import MemoryStore, Question, Reply, Span, make_readers
from mc_runtime.eval.readers.opening import parse_names, parse_size
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.lens_questions import Article, says
from mc_runtime.train.lens_questions import Question as ArticleQuestion


@pytest.fixture
def corpus(model: LoadedModel, tmp_path: Path) -> Corpus:
    rng = random.Random(0)
    words = ["sea", "wind", "house", "night", "rain", "bread", "hill", "stone"]
    lines = (" ".join(rng.choices(words, k=8)).capitalize() + ". " for _ in range(500))
    path = tmp_path / "text.txt"
    path.write_text("".join(lines))
    return Corpus.open(path, model.tokenizer, tmp_path / "tokens")


@pytest.fixture
def articles() -> list[Article]:
    """Of 40 paragraphs each, every one of which answers a question."""
    rng = random.Random(5)
    found = []
    for a in range(4):
        names = [f"Keeper{a}x{i}" for i in range(40)]
        lines = [" ".join(rng.choices(["sea", "wind", "night", "hill"], k=20)).capitalize() + "." for _ in names]
        paragraphs = tuple(f"{line} Lamp {a}-{i} is kept by {names[i]}. {line}" for i, line in enumerate(lines))
        asked = tuple(
            ArticleQuestion(i, f"Who keeps lamp {a}-{i}?", name, paragraphs[i].index(name))
            for i, name in enumerate(names)
        )
        found.append(Article(f"lamps {a}", paragraphs, asked))
    return found


def said(model: LoadedModel, case: Case, span: Span) -> str:
    return model.tokenizer.decode(case.history.ids[span.start : span.stop].tolist())


def test_plant_at_drawn_depths(model: LoadedModel, corpus: Corpus) -> None:
    rng = random.Random(3)
    filler = prose([corpus], rng, 4000)
    ends = sentence_ends(model.tokenizer, filler)
    needles = [model.tokenizer.encode(f" Needle {i}.") for i in range(12)]
    depths = draw_depths(rng, 12)
    ids, spans = plant(filler, ends, needles, depths)
    assert len(ids) == 4000 + sum(len(n) for n in needles)
    longest = int(np.diff(ends).max())
    for needle, span, depth in zip(needles, spans, depths, strict=True):
        assert ids[span.start : span.stop].tolist() == needle
        assert abs(span.start - depth * len(ids)) <= longest
        assert model.tokenizer.decode([int(ids[span.start - 1])])[-1] in ".\n"
    kept = np.ones(len(ids), bool)
    for span in spans:
        kept[span.start : span.stop] = False
    assert np.array_equal(ids[kept], filler)
    assert [min(int(d * 12), 11) for d in sorted(depths)] == list(range(12))


def test_prose_goes_on_with_the_next_text(corpus: Corpus) -> None:
    whole = np.asarray(corpus.ids, np.int64)
    long = prose([corpus, corpus], random.Random(1), 3 * len(whole))
    start = int(np.flatnonzero([np.array_equal(np.roll(whole, -i)[:200], long[:200]) for i in range(len(whole))])[0])
    assert np.array_equal(long, np.resize(np.roll(whole, -start), 3 * len(whole)))


@pytest.mark.parametrize("name", TASKS)
def test_tasks(name: str, model: LoadedModel, corpus: Corpus, articles: list[Article]) -> None:
    (task,) = make_tasks([name], model.tokenizer, [corpus], 6, 1 << 17, articles)
    size, count = 12_000, 5 if task.per_history is None else min(5, task.per_history)
    case = task.make(random.Random(1), size, count)
    assert len(case.questions) == count
    assert size * 0.9 <= len(case.history.ids) <= size
    assert case.history.read is None
    again = task.make(random.Random(1), size, count)
    assert np.array_equal(again.history.ids, case.history.ids)
    assert again.questions == case.questions
    assert not np.array_equal(task.make(random.Random(2), size, count).history.ids, case.history.ids)
    whole = model.tokenizer.decode(case.history.ids.tolist())
    for question in case.questions:
        evidence = "".join(said(model, case, span) for span in question.evidence)
        assert all(says(evidence, answer) for answer in question.answers)
        assert all(whole.count(answer) >= 1 for answer in question.answers)
        assert len(set(question.candidates)) == 6
        assert question.candidates[0].split()[-1] in question.answers
        assert not {c.split()[-1] for c in question.candidates[1:]} & set(question.answers)
        assert 0 <= case.depth(question) < 1


def test_needles_are_spread_over_the_history(model: LoadedModel, corpus: Corpus) -> None:
    for task in (InProse(model.tokenizer, [corpus]), Passkey(model.tokenizer)):
        case = task.make(random.Random(0), 20_000, 10)
        assert len(case.history.ids) == 20_000
        assert sorted(int(case.depth(q) * 10) for q in case.questions) == pytest.approx(list(range(10)), abs=1)
        keys = [q.prompt for q in case.questions]
        assert len(set(keys)) == 10
    with pytest.raises(InputError, match="too few"):
        Passkey(model.tokenizer).make(random.Random(0), 500, 10)


def test_noise_is_the_filler_of_the_paper(model: LoadedModel) -> None:
    text = model.tokenizer.decode(noise(model.tokenizer, 300).tolist())
    assert text.startswith(f" {NOISE} {NOISE} ")


def test_variables_are_chained_in_order(model: LoadedModel) -> None:
    case = RULER["vt"](model.tokenizer, 5, 1 << 17).make(random.Random(4), 8000, 3)
    for question in case.questions:
        assert [s.start for s in question.evidence] == sorted(s.start for s in question.evidence)
        before = question.prompt.split("value ")[1].split()[0]
        for span, name in zip(question.evidence, question.answers, strict=True):
            assert said(model, case, span) == f" VAR {name} = {before}."
            before = f"VAR {name}"


def test_common_words_are_common(model: LoadedModel) -> None:
    case = RULER["cwe"](model.tokenizer, 5, 1 << 17).make(random.Random(4), 9000, 1)
    text = model.tokenizer.decode(case.history.ids.tolist())
    counts = Counter(word for word in text.split("\n")[1].split() if not word[0].isdigit())
    (question,) = case.questions
    assert {word for word, _ in counts.most_common(10)} == set(question.answers)
    assert set(counts.values()) == {30, 3}
    assert all(counts[c.split()[-1]] == 3 for c in question.candidates[1:])
    case = RULER["fwe"](model.tokenizer, 5, 1 << 17).make(random.Random(4), 9000, 1)
    (question,) = case.questions
    coded = Counter(model.tokenizer.decode(case.history.ids.tolist()).split("coded words. ")[1].split())
    ranked = [word for word, _ in coded.most_common()]
    assert ranked[0] == "...."
    assert set(ranked[1:4]) == set(question.answers)
    assert ranked[1] == question.answers[0]


def test_long_histories_are_read_around_what_is_asked(model: LoadedModel, corpus: Corpus) -> None:
    case = InProse(model.tokenizer, [corpus], read_limit=4000).make(random.Random(0), 8000, 4)
    assert case.history.read is not None
    assert sum(b - a for a, b in case.history.read) < 2000
    for question in case.questions:
        (span,) = question.evidence
        assert any(a <= max(0, span.start - 64) and span.stop + 64 <= b for a, b in case.history.read)
    ids = np.zeros(1000, np.int64)
    joined = history_of(ids, [Span(500, 520), Span(100, 110), Span(580, 600)], 10)
    assert joined.read == ((36, 174), (436, 664))
    assert history_of(ids, [Span(5, 6)], 1000).read is None


def reply(text: str = "", logprobs: tuple[float, ...] = (0.0,)) -> Reply:
    return Reply(text, logprobs, 1, 0, 0.1, 1.0, None)


def test_scoring() -> None:
    assert says("The key is 48213.", "48213")
    assert says("BREAD, of course", "bread")
    assert not says("148213", "48213")
    assert not says("482130", "48213")
    assert not says("breadth", "bread")
    question = Question("?", ("ab", "cd", "ef", "gh"), (" ab", " zz"), (Span(0, 1),))
    assert generated(question, reply("ab and gh")) == 0.5
    assert ranked_first(question, reply(logprobs=(-1.0, -2.0)))
    assert not ranked_first(question, reply(logprobs=(-1.0, -1.0)))
    assert not ranked_first(question, reply(logprobs=(-1.0, -0.5)))
    assert share([1.0, 0.0, 1.0, 1.0]).low == pytest.approx(0.3006, abs=1e-3)  # Wilson
    assert share([0.5, 0.25]).value == 0.375


def test_names_are_distinct() -> None:
    names = invented_names(random.Random(0), 200)
    parts = [part for name in names for part in name.split()]
    assert len(set(parts)) == 400


def test_sizes_and_names() -> None:
    assert [parse_size(t) for t in ("4096", "16k", "1M", "0.5k")] == [4096, 16384, 1 << 20, 512]
    for bad in ("", "k", "four", "-3", "0"):
        with pytest.raises(InputError, match="sizes"):
            parse_size(bad)
    assert parse_names("tasks", "vt,prose,vt", TASKS) == ["vt", "prose"]
    assert parse_names("tasks", "all", TASKS) == list(TASKS)
    with pytest.raises(InputError, match="tasks: expected"):
        parse_names("tasks", "vt,quiz", TASKS)
    with pytest.raises(InputError, match="texts"):
        make_tasks(["prose"], None, [], 10, 10)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="questions: the task questions needs articles"):
        make_tasks(["questions"], None, [], 10, 10, [Article("empty", ("text",), ())])  # type: ignore[arg-type]


class _Tiny(Passkey):
    """Histories that the tiny model reads in no time."""

    per_history = 3

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        case = super().make(rng, size, count)
        return Case(case.history, tuple(replace(q, max_new_tokens=4) for q in case.questions))


def test_every_reader_is_asked_the_same(model: LoadedModel, tmp_path: Path) -> None:
    config = MemoryConfig(
        budget=512, block_size=8, recent_tokens=24, ingest_chunk=64, ingest_window=64, system_prompt="be brief"
    )
    store = MemoryStore(tmp_path / "work", model, config)
    task: Task = _Tiny(model.tokenizer, candidates=3)
    setting = Setting((900, 1200), n=4, keys=20)
    read: list[int] = []
    readers = make_readers(["oracle", "recency", "full"], store)
    records = list(measure([task], readers, setting, lambda what, done, total: read.append(total)))
    store.close()
    assert len(records) == 4 * 2 * 3
    assert set(read) == {900, 1200}
    asked = [[(r.size, r.history, r.prompt, r.depth) for r in records if r.reader == reader.name] for reader in readers]
    assert asked[0] == asked[1] == asked[2]
    assert [r.history for r in records if r.reader == readers[0].name] == [0, 0, 0, 1] * 2
    assert [len(case.questions) for case in cases(task, setting, 900)] == [3, 1]
    found = rows(records)
    assert len(found) == 2 * 3
    oracle = next(row for row in found if row.reader == "memory, oracle")
    assert (oracle.seen, oracle.generated.n, oracle.copied) == (1.0, 4, 0.0)
    assert sum(part[0].n for part in oracle.by_depth if part is not None) == 4
    data = json.loads(json.dumps(to_json({"n": 4}, records)))
    assert data["schema"].startswith("megacontext/needle")
    assert [Record(**r) for r in data["replies"]] == records
    assert data["rows"][0]["ranked"]["value"] == found[0].ranked.value


def test_a_history_too_long_for_a_reader_is_left_out(
    model: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore(tmp_path / "work", model, MemoryConfig(budget=320, block_size=8, recent_tokens=24))
    readers = make_readers(["none", "full"], store)
    caplog.set_level("INFO", "mc_runtime")
    records = list(measure([_Tiny(model.tokenizer, candidates=3)], readers, Setting((5000,), n=2)))
    assert {r.reader for r in records} == {"no text"}
    assert "full context: left out at 5000 tokens" in caplog.text


def test_command(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    out, picture = tmp_path / "report.json", tmp_path / "report.png"
    arguments = [
        "eval", "needle", "--tasks", "passkey,vt", "--sizes", "2k", "--readers", "none,recency", "-n", "2",
        "--keys", "2", "--work", str(tmp_path / "work"), "--out", str(out), "--plot", str(picture),
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert {(row["task"], row["reader"]) for row in report["rows"]} == {
        (task, reader) for task in ("passkey", "vt") for reader in ("no text", "recency (StreamingLLM)")
    }
    assert len(report["replies"]) == 8
    assert report["setting"]["budget"] == 2048
    assert picture.stat().st_size > 10_000
    table = CliRunner().invoke(cli.app, ["eval", "table", str(out)], catch_exceptions=False).output.splitlines()
    assert table[2] == "| reader | passkey, 2,048 tokens | vt, 2,048 tokens |"
    assert [line.split(" | ")[0] for line in table[4:]] == ["| no text", "| recency (StreamingLLM)"]
    assert "n = 2 questions" in table[0]
    with pytest.raises(InputError, match="readers"):
        CliRunner().invoke(cli.app, ["eval", "needle", "--tasks", "vt", "--readers", "x"], catch_exceptions=False)
    with pytest.raises(InputError, match="refresh: expected one of none, tail, top, text, full, got 'half'"):
        CliRunner().invoke(cli.app, [*arguments, "--refresh", "half"], catch_exceptions=False)


def test_articles_that_do_not_suffice_are_refused(model: LoadedModel, articles: list[Article]) -> None:
    (task,) = make_tasks(["questions"], model.tokenizer, [], 10, 1 << 17, articles)
    for size, count in ((1 << 20, 1), (4096, 100)):
        with pytest.raises(
            InputError, match=f"sizes: the articles give .* expected {size} tokens and {count} questions"
        ):
            task.make(random.Random(0), size, count)


def test_wrong_answers_are_of_the_same_article_and_not_half_right(model: LoadedModel) -> None:
    text = "Ada Lovelace, Ada, Babbage, Menabrea and Byron."
    answers = ("Ada Lovelace", "Ada", "Babbage", "BABBAGE", "Menabrea", "Byron")
    asked = tuple(ArticleQuestion(0, f"Question {i}?", a, text.lower().index(a.lower())) for i, a in enumerate(answers))
    (task,) = make_tasks(["questions"], model.tokenizer, [], 4, 1 << 17, [Article("a", (text,) * 9, asked)])
    for question in task.make(random.Random(0), 40, 3).questions:
        right, *wrong = question.candidates
        assert question.answers == (right,)
        assert len({w.lower() for w in wrong}) == 3
        assert all(w.lower() not in right.lower() and right.lower() not in w.lower() for w in wrong)
