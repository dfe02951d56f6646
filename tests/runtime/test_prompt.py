"""How a turn reads its prompt: once, with what it opens, unless attention to it decides what is opened."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checks import check_context, check_session, counted_forwards, kv_by_rank, relative_error, words

from mc_runtime import Session
from mc_runtime.context import WorkingContext
from mc_runtime.focus.view import FocusView, Utilities
from mc_runtime.turns import Turn

Memory = Callable[..., Session]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def turn_of(session: Session, *, remembered: bool = True) -> Turn:
    def commit(context: WorkingContext) -> None:
        context.commit(session.builder, lambda transaction, start, stop: None)

    return Turn(session.model, session.context, session.focus, commit if remembered else None)


def asked(session: Session) -> tuple[list[int], str]:
    """A question about a passage that is closed."""
    text = session.model.tokenizer.decode(session.tree.tokens(160, 200).tolist())
    return session.model.chat.user_turn_ids(text), text


@pytest.mark.parametrize("refresh", ["none", "tail", "text", "full"])
@pytest.mark.parametrize("remembered", [True, False])
def test_a_prompt_is_run_once(memory: Memory, monkeypatch: pytest.MonkeyPatch, refresh: str, remembered: bool) -> None:
    session = memory(refresh=refresh, refresh_tail=8, budget=512, recent_tokens=64)
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=3)
    ids, text = asked(session)
    before, turn = session.tree.length, turn_of(session, remembered=remembered)
    with counted_forwards(monkeypatch) as counts:
        logits = turn.read(ids, text)
    assert len(counts) == 1
    assert turn.stats.expanded
    assert counts[0] == turn.stats.recomputed > len(ids)
    assert session.tree.length - before == len(ids) * remembered
    assert session.context.pending == ([] if remembered else ids)
    check_context(session.context)

    if refresh == "full":
        twin = session.context.fork(session.context.cache.stacked(1))
        twin.assemble(twin.expanded)
        got, expected = kv_by_rank(session.context), kv_by_rank(twin)
        assert max(relative_error(a, b) for a, b in zip(got, expected, strict=True)) < 1e-5
    last = session.context.run(torch.arange(session.context.used)[-1:].numpy())
    assert relative_error(logits, session.context.engine.logits(last.hidden[0, -1])) < 1e-5
    if remembered:
        turn.finish([])
        check_session(session)
    else:
        session.context.drop_pending()


def test_a_policy_that_looks_at_attention_sees_the_prompts(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(policy="attention", refresh="none")
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=3)
    ids, text = asked(session)
    with counted_forwards(monkeypatch) as counts:
        turn = turn_of(session)
        turn.read(ids, text)
    assert counts[0] == len(ids)
    assert counts[1:] == [turn.stats.recomputed]
    turn.finish([])


@pytest.mark.parametrize("budget", [96, 512])
def test_parts_of_a_long_prompt(memory: Memory, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    """Of a prompt that is read in parts the last one is run with what is opened, if it is kept in full."""
    session = memory(budget=budget, refresh="none", recent_tokens=8)
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=3)
    prompt = session.model.tokenizer.encode(words(320, seed=2))
    before, turn = session.tree.length, turn_of(session)
    appended: list[int] = []
    plain = WorkingContext.append
    monkeypatch.setattr(
        WorkingContext, "append", lambda self, ids, **kw: appended.append(len(ids)) or plain(self, ids, **kw)
    )
    turn.read(prompt, "what?")
    last = len(prompt) - sum(appended)
    assert appended
    assert (0 < last <= session.focus.turn_tokens) or (last == 0 and appended[-1] > session.focus.turn_tokens)
    assert session.tree.length == before + len(prompt)
    turn.finish([])
    check_session(session)


def test_nothing_is_appended_behind_what_was_announced(memory: Memory) -> None:
    session = memory()
    session.generate("hello", max_new_tokens=3)
    session.context.announce([65, 66])
    kv = kv_by_rank(session.context)
    with pytest.raises(ValueError, match=r"expected all \d+ tokens of the history in it, got \d+; lay it out"):
        session.context.append([67])
    assert session.context.pending == [65, 66]
    assert all(torch.equal(a, b) for a, b in zip(kv, kv_by_rank(session.context), strict=True))
    session.context.drop_pending()
    check_session(session)


class FailsAt:
    """Sees no use in anything, and fails at one of its calls."""

    needs_mass = False

    def __init__(self, call: int) -> None:
        self.call, self.calls = call, 0

    def utilities(self, view: FocusView) -> Utilities:
        self.calls += 1
        if self.calls == self.call:
            raise LookupError("no answer")
        return {}


def test_a_prompt_whose_refocus_fails_is_remembered(memory: Memory) -> None:
    """It was announced and not run: it is run when the turn ends, and the answer is empty."""
    session = memory(policy=FailsAt(2), budget=512, recent_tokens=64)
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=3)
    with pytest.raises(LookupError, match="no answer"):
        session.generate("what of the lamp?", max_new_tokens=3)
    assert session.context.entries.stop == session.context.length == session.tree.length
    assert "what of the lamp?" in session.model.tokenizer.decode(session.tree.tokens().tolist())
    check_session(session)
    session.generate("and now?", max_new_tokens=3)
    check_session(session)


def test_prompts_of_a_list_whose_refocus_fails_leave_nothing(memory: Memory) -> None:
    session = memory(policy=FailsAt(3), budget=512, recent_tokens=64)
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=3)
    before, kv = session.tree.length, kv_by_rank(session.context)
    with pytest.raises(LookupError, match="no answer"):
        session.generate(["what of the lamp?", "and of the house?"], max_new_tokens=3)
    assert (session.tree.length, session.context.pending) == (before, [])
    assert all(torch.equal(a, b) for a, b in zip(kv, kv_by_rank(session.context), strict=True))
    check_session(session)
