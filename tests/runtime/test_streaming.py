"""Streams: their pieces, their end, and what is refused while one is open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from checks import check_session, words

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel

Memory = Callable[..., Session]


def kinds(session: Session) -> list[tuple[str, int]]:
    return [(d.kind, d.stop - d.start) for d in session.tree.documents()]


def test_streamed_pieces_add_up_to_the_answer(memory: Memory) -> None:
    sampling: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0, "seed": 5, "stop": ["e", "keeper"]}
    answers, trees = [], []
    for name in ("one", "two"):
        session = memory(name)
        session.ingest(words(400))
        if name == "one":
            answers.append(session.generate("and the sea?", **sampling))
        else:
            pieces = list(session.generate("and the sea?", stream=True, **sampling))
            assert all(pieces)
            answers.append("".join(pieces))
        trees.append(session.tree.tokens().tolist())
    assert answers[0] == answers[1]
    assert trees[0] == trees[1]


@pytest.mark.parametrize("taken", [1, 5, 20])
def test_a_stream_that_is_closed_early_is_kept(memory: Memory, model: LoadedModel, taken: int) -> None:
    session = memory()
    session.ingest(words(400))
    stream = session.generate("and the sea?", stream=True, max_new_tokens=64)
    pieces = [next(stream) for _ in range(taken)]
    stream.close()
    assert kinds(session)[-1][0] == "assistant"
    answer = session.tree.documents()[-1]
    ids = session.tree.tokens(answer.start, answer.stop).tolist()
    end = model.chat.assistant_end_ids()
    assert ids[-len(end) :] == end
    assert model.tokenizer.decode(ids[: -len(end)]).startswith("".join(pieces))
    assert session.stats().turns[-1].new_tokens < 64
    assert not session.context.pending
    check_session(session)
    session.generate("go on", max_new_tokens=2)


def test_leaving_a_loop_over_a_stream_ends_the_turn(memory: Memory) -> None:
    session = memory()
    for _ in session.generate("and the sea?", stream=True, max_new_tokens=64):
        break
    assert kinds(session)[-1][0] == "assistant"
    session.generate("go on", max_new_tokens=2)


@pytest.mark.parametrize("closing", ["close", "with"])
def test_closing_during_a_stream_keeps_the_turn(memory: Memory, closing: str) -> None:
    session = memory("one")
    stream = session.generate("and the sea?", stream=True, max_new_tokens=64)
    next(stream)
    if closing == "close":
        session.close()
    else:
        with session:
            pass
    assert list(stream) == []
    again = memory("one")
    assert [kind for kind, _ in kinds(again)] == ["system", "user", "assistant"]
    again.generate("go on", max_new_tokens=2)


def test_calls_during_a_stream_are_refused(memory: Memory) -> None:
    session = memory()
    document = session.ingest(words(100))
    waiting = session.generate("later", stream=True, max_new_tokens=4)
    stream = session.generate("and the sea?", stream=True, max_new_tokens=8)
    next(stream)
    calls: list[Callable[[], Any]] = [
        lambda: session.ingest("text"),
        lambda: session.ingest_evidence([{"text": "text"}]),
        lambda: session.generate("hello"),
        lambda: session.generate(["hello"]),
        lambda: session.focus_on("sea"),
        lambda: session.pin(document),
        lambda: session.unpin(document),
        lambda: session.save(),
        lambda: next(waiting),
    ]
    for call in calls:
        with pytest.raises(InputError, match="still streaming"):
            call()
    session.search("sea")
    session.stats()
    session.focus_map().text()
    rest = list(stream)
    assert rest
    session.generate("hello", max_new_tokens=1)
    assert [kind for kind, _ in kinds(session)] == ["system", "document", *["user", "assistant"] * 2]
