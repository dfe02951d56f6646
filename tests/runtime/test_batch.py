"""Several prompts at once: each is answered as by a session of its own, and nothing is remembered."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import bring_in, check_session, kv_by_rank, refused, words

from mc_runtime import Session
from mc_runtime.batch import BATCH_ROWS
from mc_runtime.errors import BudgetError, InputError
from mc_runtime.kv_cache import KVCache

Memory = Callable[..., Session]
PROMPTS = ["the dog?", "bread, rain", "the lamp", "wind and stone"]


def prepared(memory: Memory, tmp_path: Path, **settings: Any) -> Session:
    """A memory that has been laid out, and copies of it: `copy 0`, `copy 1`, ..."""
    session = memory("one", **settings)
    session.ingest(words(704 - session.tree.length, seed=1))  # whole blocks
    bring_in(session)
    session.save()
    for i in range(len(PROMPTS)):
        shutil.copytree(tmp_path / "one", tmp_path / f"copy {i}")
    return session


# Prompt and answer complete no block here: from then on a session's tree, and what is made of it, differs from a
# branch's.
@pytest.mark.parametrize(
    "settings",
    [{}, {"gist_kind": "projected", "refresh": "full"}, {"gist_kind": "embedding", "policy": "attention"},
     {"archive_kv": 5, "refresh": "none"}],
    ids=["default", "projected", "embedding", "archive"],
)  # fmt: skip
def test_answers_are_those_of_single_sessions(memory: Memory, tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"block_size": 32, "budget": 256, "ingest_chunk": 64, **settings}
    session = prepared(memory, tmp_path, **settings)
    session.search("dog")
    answers = session.generate(PROMPTS, max_new_tokens=31)
    singles, edits = [], 0
    for i, prompt in enumerate(PROMPTS):
        with memory(f"copy {i}", **settings) as single:
            single.search("dog")  # indexes the same blocks, before the prompt is read
            singles.append(single.generate(prompt, max_new_tokens=31))
            edits += single.stats().turns[-1].edits
    assert answers == singles
    assert edits > 0
    assert len(set(answers)) > 1


def test_a_long_list_is_answered_in_parts(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each prompt has a copy of the cache: as many at a time as memory is meant for, however long the list."""
    session = memory()
    session.ingest(words(500))
    rows, plain = list[int](), KVCache.stacked
    prompts = [f"{PROMPTS[i % len(PROMPTS)]} {i}" for i in range(BATCH_ROWS + 3)]
    expected = [session.generate([prompt], max_new_tokens=3)[0] for prompt in prompts]
    session.clear_stats()

    def stacked(cache: KVCache, copies: int) -> KVCache:
        rows.append(copies)
        return plain(cache, copies)

    monkeypatch.setattr(KVCache, "stacked", stacked)
    assert session.generate(prompts, max_new_tokens=3) == expected
    assert rows == [BATCH_ROWS, 3]
    assert [turn.prompt for turn in session.stats().turns] == prompts


def test_answers_end_where_the_budget_is_full(memory: Memory, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing that was said in the others is lost."""
    session = memory(budget=128, recent_tokens=8)
    session.ingest(words(500))
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": 0}
    before = session.generate(["x", "the sea?"], max_new_tokens=10, **sampling)
    session.clear_stats()
    answers = session.generate(["x", "the sea?"], max_new_tokens=300, **sampling)
    turns = session.stats().turns
    assert [len(a) > len(b) and a.startswith(b[:-4]) for a, b in zip(answers, before, strict=True)] == [True, True]
    assert [turn.finish_reason for turn in turns] == ["length", "length"]
    assert all(turn.new_tokens < 300 for turn in turns)
    assert "2 answers of a list end early" in caplog.text
    check_session(session)
    session.generate("go on", max_new_tokens=3)


def test_a_prompt_of_a_list_that_does_not_fit_is_named(memory: Memory) -> None:
    session = memory(budget=128, recent_tokens=8)
    session.ingest(words(500))
    length = session.tree.length
    with refused(BudgetError, "prompt: 'the .*' of a list, .* does not fit beside the history; a single prompt"):
        session.generate(["x", "the " + words(400)], max_new_tokens=10)
    assert session.tree.length == length
    check_session(session)
    session.generate("the " + words(400), max_new_tokens=3)


def test_long_answers_within_the_budget_are_those_of_single_sessions(memory: Memory, tmp_path: Path) -> None:
    """Over many refocus cycles, where no edit can tell the two apart."""
    session = prepared(memory, tmp_path, budget=1024, policy="retrieval", refresh="full")
    everything = (0, session.tree.length)
    session.pin(everything)
    lengths = []
    for i, prompt in enumerate(PROMPTS[:3]):
        with memory(f"copy {i}", budget=1024, policy="retrieval", refresh="full") as single:
            single.pin(everything)
            lengths.append(single.generate(prompt, max_new_tokens=70))
    assert session.generate(PROMPTS[:3], max_new_tokens=70) == lengths


@pytest.mark.parametrize("count", [1, 3])
def test_nothing_is_remembered(memory: Memory, tmp_path: Path, count: int) -> None:
    session = prepared(memory, tmp_path, archive_kv=5)
    session.generate("who?", max_new_tokens=5)
    length, documents, state = session.tree.length, len(session.tree.documents()), session.focus.state()
    kv, expanded, archived = kv_by_rank(session.context), session.context.expanded, len(session.context.archive)
    session.generate(PROMPTS[:count], max_new_tokens=40, temperature=1.0, seed=3)
    assert (session.tree.length, len(session.tree.documents())) == (length, documents)
    assert session.focus.state() == state
    assert session.context.expanded is expanded
    assert len(session.context.archive) == archived
    for before, after in zip(kv, kv_by_rank(session.context), strict=True):
        assert torch.equal(before, after)
    assert not session.context.pending
    check_session(session)
    session.tree.verify()
    assert len(session.stats().turns) == 1 + count


def test_rows_that_end_early_do_not_disturb_the_others(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end token comes at a different step in each row; texts up to it are as if asked alone."""
    session = memory(budget=160)
    session.ingest(words(500))
    bring_in(session)
    alone = [session.generate([p], max_new_tokens=24)[0] for p in PROMPTS]
    tokenizer = session.model.tokenizer
    token = tokenizer.encode(next(c for c in alone[0][3:] if c.isascii()))[0]
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "eos_ids", (*tokenizer.eos_ids, token))
        short = [session.generate([p], max_new_tokens=24)[0] for p in PROMPTS]
        together = session.generate(PROMPTS, max_new_tokens=24)
    assert together == short
    assert len({len(s) for s in short}) > 1
    assert len(short[0]) < len(alone[0])


def test_sampling_is_the_same_in_each_row_and_stops_at_stop_strings(memory: Memory) -> None:
    session = memory()
    session.ingest(words(400))
    one, two = session.generate([PROMPTS[0]] * 2, max_new_tokens=20, temperature=1.0, seed=1)
    assert one == two
    stop = one[len(one) // 2]
    assert session.generate([PROMPTS[0]], max_new_tokens=20, temperature=1.0, seed=1, stop=[stop]) == [
        one[: one.index(stop)]
    ]


def test_lists_that_cannot_be_answered(memory: Memory) -> None:
    session = memory()
    for bad in ([], [""], ["a", "  "], ["a", 3]):
        with pytest.raises(InputError, match="prompt"):
            session.generate(bad)  # type: ignore[call-overload]
    with pytest.raises(InputError, match="one prompt when streaming"):
        session.generate(["a"], stream=True)  # type: ignore[call-overload]
