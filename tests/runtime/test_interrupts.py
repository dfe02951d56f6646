"""Ctrl-C, or any error, in the middle of a call: what was remembered stays, and nothing wrong stands in the context."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from checks import SMALL, bring_in, check_session, kv_by_rank, relative_error, words
from prompt_engine import DecoderPrompts

from mc_kernels import native
from mc_runtime import Session, prompt_context
from mc_runtime.context import WorkingContext
from mc_runtime.kv_cache import KVCache, SlotWriter
from mc_runtime.model import LoadedModel
from mc_runtime.model.native_layers import NativeLayers
from mc_runtime.served import ServedSession
from mc_runtime.tree import catalogue

Memory = Callable[..., Session]
# All that stands behind an edit is recomputed: the context is at every step what a context made from scratch is.
FULL: dict[str, Any] = {"refresh": "full", "refresh_decode": "full"}

CALLS: dict[str, Callable[[Session], Any]] = {
    "a turn": lambda s: s.generate("where does the keeper keep the bread?", max_new_tokens=20),
    "a prompt in parts": lambda s: s.generate(words(260, 5), max_new_tokens=3),
    "a hint": lambda s: s.focus_on((60, 100)),
    "a pin": lambda s: s.pin((60, 70)),
}
# What is interrupted after it has been done: keys of one layer alone, an edit that is not recorded, tokens that are
# run and not recorded.
PLACES: dict[str, tuple[type, str]] = {
    "a layer": (SlotWriter, "update"),
    "all layers": (NativeLayers, "run"),
    "a splice": (KVCache, "splice"),
    "a layout": (WorkingContext, "show"),
    "new tokens": (WorkingContext, "extend"),
}


def interrupted(patch: pytest.MonkeyPatch, place: tuple[Any, str], after: int) -> list[int]:
    """Let the call number `after` (from 0 on) of a function be done and then end in KeyboardInterrupt, once. The list
    counts its calls."""
    plain, calls = getattr(*place), [0]
    if place == PLACES["a layer"]:  # one after the other
        patch.setattr(NativeLayers, "run", lambda *_: None)

    def once(*args: Any, **kw: Any) -> Any:
        result = plain(*args, **kw)
        calls[0] += 1
        if calls[0] == after + 1:
            raise KeyboardInterrupt
        return result

    patch.setattr(*place, once)
    return calls


def check_all(session: Session) -> None:
    context = session.context
    assert not context.pending
    check_session(session)
    session.tree.verify()
    with torch.inference_mode():
        bring_in(session)
        twin = context.fork(context.cache.stacked(1))
        twin.cache.data.fill_(1e3)
        twin.assemble(context.expanded)
    for got, expected in zip(kv_by_rank(context), kv_by_rank(twin), strict=True):
        assert relative_error(got, expected) < 1e-5


READS = ("a turn", "a prompt in parts")


@pytest.mark.parametrize(("call", "place"), [(c, p) for c in CALLS for p in PLACES if c in READS or p != "new tokens"])
def test_what_is_interrupted_leaves_nothing_wrong(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, call: str, place: str
) -> None:
    if place == "all layers" and native.available() is not None:
        pytest.skip(f"no native library: {native.available()}")
    session = memory(**FULL)
    session.ingest(words(700, 1))
    session.generate("what of the house?", max_new_tokens=6)
    with monkeypatch.context() as patch:
        calls = interrupted(patch, PLACES[place], after=10**9)
        CALLS[call](session)
    assert calls[0]
    for after in np.unique(np.linspace(0, calls[0] - 1, 4).astype(int)):
        before = session.tree.tokens().tolist()
        with monkeypatch.context() as patch:
            counted = interrupted(patch, PLACES[place], int(after))
            try:
                CALLS[call](session)
            except KeyboardInterrupt:
                assert counted[0] > after
        assert session.tree.tokens()[: len(before)].tolist() == before
        check_all(session)
        session.focus.pins.clear()
        session.generate("and now?", max_new_tokens=3)
        check_all(session)


@pytest.mark.parametrize("number", range(3))
def test_a_commit_that_is_interrupted_once_it_is_done(
    memory: Memory, model: LoadedModel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Ctrl-C while the disk is synced: Python raises it when the commit has taken place. Nothing is stored twice."""
    session = memory(**FULL)
    session.generate("what of the house?", max_new_tokens=6)
    before = session.tree.tokens().tolist()
    with monkeypatch.context() as patch:
        interrupted(patch, (catalogue.storage, "commit"), after=number)
        with pytest.raises(KeyboardInterrupt):
            session.generate("where is the bread?", max_new_tokens=14)
    check_all(session)
    question = model.chat.user_turn_ids("where is the bread?")
    added = session.tree.tokens().tolist()[len(before) :]
    assert added[: len(question)] == question
    answer = added[len(question) :]
    end = model.chat.assistant_end_ids()
    assert answer[-len(end) :] == end
    assert len(answer) - len(end) == (0, 8, 14)[number]  # commits: the question, every 8 tokens, the end
    session.generate("and now?", max_new_tokens=3)
    check_all(session)


def test_an_answer_that_cannot_be_ended_is_dropped(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted twice: while decoding, and again while what was said is made durable."""
    session = memory(**FULL)
    session.ingest(words(300, 1))
    stream = session.generate("what of the house?", stream=True, max_new_tokens=40)
    for _ in range(3):
        next(stream)
    length = session.tree.length

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(WorkingContext, "extend", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert list(stream) == []
    assert session.tree.length == length  # the three tokens were not durable yet, nor read back
    check_all(session)
    session.generate("and now?", max_new_tokens=3)
    check_all(session)


def test_a_served_turn_that_is_interrupted_anywhere_in_its_context(tmp_path: Path, model: LoadedModel) -> None:
    """Ctrl-C between any two lines of what changes a context that is only a layout."""

    def interrupted_at(line: int, session: ServedSession) -> int:
        """Interrupt a turn at the line number `line` of those that it runs; how many it has run."""
        seen = 0

        def local(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == line:
                    raise KeyboardInterrupt
            return local

        def enter(frame: FrameType, event: str, _: Any) -> Any:
            return local if frame.f_code.co_filename == prompt_context.__file__ else None

        before = sys.gettrace()
        sys.settrace(enter)
        try:
            session.generate("where is the boat?", max_new_tokens=17)
        except KeyboardInterrupt:
            assert seen == line
        finally:
            sys.settrace(before)
            torch.set_grad_enabled(True)  # what ends a `with` on its last line leaves it without its exit
        return seen

    engine = DecoderPrompts(model.decoder)
    with ServedSession.open(tmp_path / "served", engine, model, gistnet="untrained", **SMALL) as session:
        session.ingest(words(300))
        lines = interrupted_at(-1, session)
        assert lines > 60
        for line in range(1, lines, 3):
            interrupted_at(line, session)
            context = session.context
            assert not context.pending
            assert context.entries.stop in (0, session.tree.length)
            session.tree.verify()
            turns = [d for d in session.tree.documents() if d.kind in ("user", "assistant")]
            assert all(a.stop == b.start for a, b in itertools.pairwise(turns))
        bring_in(session)
        twin = context.fork()
        twin.clear()
        twin.relayout(context.expanded)
        assert torch.equal(twin.rows(), context.rows())
