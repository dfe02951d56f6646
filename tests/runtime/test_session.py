"""`Session`: turns, streams, pins, hints, evidence, and how a call that fails leaves the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checks import bring_in, check_session, counted_forwards, kv_by_rank, relative_error, watched, words

from mc_runtime import Session
from mc_runtime.errors import BudgetError, InputError
from mc_runtime.model import LoadedModel

Memory = Callable[..., Session]


def kinds(session: Session) -> list[tuple[str, int]]:
    return [(d.kind, d.stop - d.start) for d in session.tree.documents()]


def test_a_turn_is_remembered_token_by_token(memory: Memory, model: LoadedModel) -> None:
    session = memory()
    session.ingest(words(500))
    start = session.tree.length
    answer = session.generate("what of the dog?", max_new_tokens=37)
    prompt, end = model.chat.user_turn_ids("what of the dog?"), model.chat.assistant_end_ids()
    ids = session.tree.tokens(start).tolist()
    assert ids[: len(prompt)] == prompt
    assert ids[-len(end) :] == end
    said = ids[len(prompt) : -len(end)]
    assert len(said) <= 37
    assert model.tokenizer.decode(said) == answer
    user, assistant = session.tree.documents()[-2:]
    assert (user.kind, user.start, user.stop) == ("user", start, start + len(prompt))
    assert (assistant.kind, assistant.stop) == ("assistant", session.tree.length)
    stats = session.stats()
    assert stats.turns[-1].new_tokens == len(said) == len(stats.turns[-1].decode)
    assert stats.turns[-1].prompt_tokens == len(prompt)
    assert stats.used == session.context.used
    assert stats.tokens == session.tree.length == session.context.length
    session.tree.verify()


@pytest.mark.parametrize(
    ("kind", "refresh"), [("pooled", "none"), ("pooled", "top"), ("projected", "tail"), ("embedding", "full")]
)
def test_the_budget_holds_at_every_step(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, kind: str, refresh: str
) -> None:
    session = memory(gist_kind=kind, refresh=refresh, budget=128)
    with watched(monkeypatch, session):
        session.ingest(words(900))
        while sum(turn.new_tokens for turn in session.stats().turns) < 120:  # a random model may stop at any token
            session.generate("what of the dog?", max_new_tokens=120)
    assert sum(turn.collapsed for turn in session.stats().turns) > 5  # what was said cannot stay in 128 slots
    assert max(session.stats().slots) >= 2


def test_a_prompt_longer_than_the_budget_is_read_in_parts(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(budget=128)
    session.ingest(words(300))
    with watched(monkeypatch, session):
        session.generate(words(400, seed=4), max_new_tokens=3)
    assert session.tree.documents()[-2].stop - session.tree.documents()[-2].start > 400


def test_a_prompt_longer_than_the_budget_costs_what_it_is_long(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making room for its next part runs little again, and after the last part all is recomputed once."""
    session = memory(refresh="full")
    session.ingest(words(600))
    with counted_forwards(monkeypatch) as entries:
        session.generate(words(1500, seed=7), max_new_tokens=1)
    assert sum(entries) < 1.6 * 1500
    context = session.context
    with torch.inference_mode():
        twin = context.fork(context.cache.stacked(1))
        twin.assemble(context.expanded)
    for got, expected in zip(kv_by_rank(context), kv_by_rank(twin), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_a_closed_session_says_so(memory: Memory) -> None:
    session = memory()
    waiting = session.generate("later", stream=True)
    session.close()
    session.close()
    for call in (lambda: session.ingest("x"), lambda: session.generate("x"), lambda: session.save()):
        with pytest.raises(InputError, match="closed; open the memory again"):
            call()
    assert list(waiting) == []


def test_a_refused_prompt_leaves_nothing(memory: Memory) -> None:
    memory(system_prompt="x" * 250, budget=512).close()
    session = memory()
    before = kinds(session)
    for _ in range(2):
        with pytest.raises(BudgetError, match=r"raise the budget or pin less .* 260 first ones"):
            session.generate("hello", max_new_tokens=4)
    assert kinds(session) == before
    assert not session.context.pending


def test_pins_stay_in_full_detail(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory()
    document = session.ingest(words(600))
    span = (document.start + 101, document.start + 131)
    with watched(monkeypatch, session):  # checks the pins at every step
        session.pin(span)
        session.generate("what of the dog?", max_new_tokens=40)
    entries = session.context.entries
    tokens = set(entries.index[entries.levels == 0].tolist())
    assert set(range(*span)) <= tokens
    session.unpin(span)
    assert session.focus.pins == []
    with pytest.raises(InputError, match="is not pinned"):
        session.unpin(span)


def test_a_pin_that_does_not_fit_pins_nothing(memory: Memory) -> None:
    session = memory()
    document = session.ingest(words(600))
    session.generate("what of the dog?", max_new_tokens=4)
    k, v = kv_by_rank(session.context)
    with pytest.raises(BudgetError, match="pin less"):
        session.pin(document)
    assert session.focus.pins == []
    after = kv_by_rank(session.context)
    assert torch.equal(k, after[0])
    assert torch.equal(v, after[1])
    session.generate("go on", max_new_tokens=2)


@pytest.mark.parametrize("span", [(-1, 5), (5, 5), (9, 3), (0, 10_000)])
def test_spans_outside_the_history_are_refused(memory: Memory, span: tuple[int, int]) -> None:
    session = memory()
    session.ingest(words(100))
    for call in (session.pin, session.focus_on, session.unpin):
        with pytest.raises(InputError, match="span: expected 0 <= start < stop"):
            call(span)


def test_a_hit_stands_for_its_span(memory: Memory) -> None:
    session = memory()
    session.ingest(words(900))
    hit = session.search("lamp")[0]
    session.pin(hit)
    assert session.focus.pins == [(hit.start, hit.stop)]
    session.focus_on(hit)
    assert session.focus_map().frames[-1].label == f"focus on {hit.start}-{hit.stop}"
    entries = session.context.entries
    assert set(range(hit.start, hit.stop)) <= set(entries.index[entries.levels == 0].tolist())
    session.unpin(hit)
    assert session.focus.pins == []


def test_a_hint_brings_a_span_into_detail(memory: Memory) -> None:
    session = memory()
    document = session.ingest(words(900))
    session.generate("hm", max_new_tokens=2)
    span = (document.start + 200, document.start + 260)
    session.focus_on(span)
    entries = session.context.entries
    assert set(range(*span)) <= set(entries.index[entries.levels == 0].tolist())
    check_session(session)
    session.focus_on(None)
    assert session.focus.hints == {}
    session.focus_on(document)  # more than fits: as much as the budget allows
    check_session(session)
    session.focus_on("hm")  # the next hint: the span has no claim any more
    assert session.focus.hints == {}


def test_a_text_to_focus_on_is_found(memory: Memory) -> None:
    session = memory(block_size=32, budget=256)
    session.ingest(words(500, seed=1) + " Agnes keeps the violet lighthouse. " + words(500, seed=2))
    bring_in(session)
    session.focus_on("violet lighthouse")
    hit = session.search("violet lighthouse")[0]
    assert "violet" in hit.text
    entries = session.context.entries
    assert hit.start in entries.index[entries.levels == 0]


def test_evidence_is_part_of_the_history_in_detail(memory: Memory) -> None:
    session = memory()
    session.ingest(words(900))
    hits = [{"text": words(50, seed=8), "source": "a.txt", "score": 3.5}, {"text": "the boat is red"}]
    documents = session.ingest_evidence(hits)
    assert [(d.kind, d.source, d.score) for d in documents] == [("evidence", "a.txt", 3.5), ("evidence", None, None)]
    again = session.ingest_evidence(session.search("boat", top=1))
    assert again[0].score == session.tree.document(again[0].id).score
    session.generate("the boat?", max_new_tokens=2)
    entries = session.context.entries
    assert set(range(again[0].start, again[0].stop)) <= set(entries.index[entries.levels == 0].tolist())
    assert session.ingest_evidence([]) == []


@pytest.mark.parametrize("bad", ["text", {"text": ""}, {}, {"text": 3}, {"text": "a", "score": "b"}, None])
def test_bad_evidence_is_refused_as_a_whole(memory: Memory, bad: Any) -> None:
    session = memory()
    length = session.tree.length
    with pytest.raises(InputError, match=r"hits\[1\]"):
        session.ingest_evidence([{"text": "good"}, bad])
    with pytest.raises(InputError, match=r"hits\[0\]"):
        session.ingest_evidence([{"text": "a", "score": float("nan")}])
    assert session.tree.length == length


def test_the_focus_map_has_a_frame_per_turn(memory: Memory) -> None:
    session = memory()
    session.ingest(words(300))
    assert session.focus_map().frames == []  # nothing has been laid out
    session.generate("one?", max_new_tokens=1)
    session.focus_on("sea")
    session.focus_on((20, 30))
    session.generate("two?", max_new_tokens=1)
    focus_map = session.focus_map()
    assert [f.label for f in focus_map.frames] == ["one?", "sea", "focus on 20-30", "two?"]
    assert focus_map.documents[0] == (0, "system prompt")
    assert np.all(np.diff([f.length for f in focus_map.frames]) >= 0)
    session.close()
    assert [f.label for f in memory().focus_map().frames] == ["now"]
