"""What of a conversation is told, and what that does to retrieval."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from checks import bring_in, words

from mc_runtime import Session
from mc_runtime.focus import FocusView, RetrievalPolicy
from mc_runtime.told import statements

Memory = Callable[..., Session]
QUESTION = "What is the colour of the violet lighthouse?"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The lamp is red. What of the door? It is shut.", ["The lamp is red.", "It is shut."]),
        ("Is it?! Really?", []),
        ("no full stop", ["no full stop"]),
        ("\u706f\u662f\u7ea2\u7684\u3002\u95e8\u5462\uff1f", ["\u706f\u662f\u7ea2\u7684\u3002"]),
        ("", []),
    ],
)
def test_questions_tell_nothing(text: str, told: list[str]) -> None:
    assert statements(text).split() == " ".join(told).split()


def utilities(session: Session, query: str = QUESTION) -> dict[int, float]:
    bring_in(session)
    session.retrieval.update()
    context = session.context
    view = FocusView(context, context.synced_expanded(), query, None, session.retrieval, context.length, asked=True)
    nodes, nats = RetrievalPolicy().utilities(view)[1]
    return dict(zip(nodes.tolist(), nats.tolist(), strict=True))


def blocks_of(session: Session, word: str) -> set[int]:
    """Blocks in which a word stands."""
    needle = np.array(session.model.tokenizer.encode(word))
    ids = session.tree.tokens()
    at = [i for i in range(len(ids) - len(needle)) if (ids[i : i + len(needle)] == needle).all()]
    assert at, word
    return {b for i in at for b in range(i // 32, (i + len(needle) - 1) // 32 + 1)}


@pytest.fixture
def lighthouse(memory: Memory) -> Session:
    """A fact far back in a long text, and two questions after it."""
    session = memory(block_size=32, budget=400, recent_tokens=32, policy=RetrievalPolicy())
    fact = " The colour of the violet lighthouse is green. The violet lighthouse is kept by Agnes. "
    session.ingest(words(1500, seed=1) + fact + words(1500, seed=2))
    for question in (QUESTION, "What of the dog?"):
        session.generate(question, max_new_tokens=8)
    return session


def opened(session: Session, word: str) -> float:
    found = utilities(session)
    return max(found.get(block, 0.0) for block in blocks_of(session, word))


def test_a_statement_of_the_user_is_opened(lighthouse: Session) -> None:
    lighthouse.generate("The colour of the violet lighthouse is purple from today on.", max_new_tokens=8)
    lighthouse.generate("What of the sea?", max_new_tokens=8)
    lighthouse.ingest(words(200, seed=4))
    assert opened(lighthouse, "purple") == pytest.approx(max(utilities(lighthouse).values()))


def test_a_text_that_comes_in_between_turns_is_opened(lighthouse: Session) -> None:
    lighthouse.ingest(" News: from now on, the colour of the violet lighthouse is purple. ")
    lighthouse.generate("What of the sea?", max_new_tokens=8)
    lighthouse.ingest(words(200, seed=4))
    assert opened(lighthouse, "purple") == pytest.approx(max(utilities(lighthouse).values()))


def test_an_earlier_question_is_not_what_answers_it(lighthouse: Session) -> None:
    lighthouse.ingest(words(200, seed=4))
    found = utilities(lighthouse)
    first_turn = next(d for d in lighthouse.tree.documents() if d.kind == "user")
    best = max(found.values())
    assert opened(lighthouse, "green") == pytest.approx(best)
    assert all(found.get(b, 0.0) < best / 2 for b in range(first_turn.start // 32 + 1, lighthouse.tree.count(1)))


def test_of_several_corrections_the_newest_is_opened(lighthouse: Session) -> None:
    for colour in ("purple", "silver"):
        lighthouse.ingest(words(150, seed=5))
        lighthouse.ingest(f" From now on, the colour of the violet lighthouse is {colour}. ")
    lighthouse.ingest(words(200, seed=4))
    assert opened(lighthouse, "silver") == pytest.approx(max(utilities(lighthouse).values()))


def test_words_that_are_told(lighthouse: Session) -> None:
    index = lighthouse.retrieval
    turn = next(d for d in lighthouse.tree.documents() if d.kind == "user")
    block = turn.start // 32
    assert {"colour", "violet", "lighthous"} <= index.words(QUESTION, block, block + 2)
    assert not {"colour", "violet", "lighthous"} & index.told_words(QUESTION, block, block + 2)
    fact = min(blocks_of(lighthouse, "green"))
    assert index.told_words(QUESTION, fact - 1, fact + 2) == index.words(QUESTION, fact - 1, fact + 2)
    assert index.told_words(QUESTION, -5, 0) == frozenset()


def test_a_search_finds_what_is_told_before_what_was_asked(lighthouse: Session) -> None:
    lighthouse.generate("The keeper of the violet lighthouse is Bert from today on.", max_new_tokens=8)
    lighthouse.ingest(words(64, seed=4))
    hits = lighthouse.search(QUESTION)
    assert hits[0].start // 32 in blocks_of(lighthouse, "green")
    assert hits[0].kind == "document"
    asked = [hit for hit in hits if hit.kind == "user"]
    assert asked
    assert all(hit.score < hits[0].score for hit in asked)
    # What the user has stated counts in full.
    hit = lighthouse.search("keeper of the violet lighthouse", kinds=["user"])[0]
    assert "keeper" in hit.text
    assert hit.score == pytest.approx(lighthouse.retrieval.ranked("keeper of the violet lighthouse")[hit.start // 32])


def test_a_search_in_some_kinds_of_documents(lighthouse: Session) -> None:
    lighthouse.ingest(words(64, seed=4))
    question = next(d for d in lighthouse.tree.documents() if d.kind == "user")
    asked = lighthouse.search("violet lighthouse", kinds=["user"])
    assert asked
    for hit in asked:
        assert (hit.kind, hit.source) == ("user", "user, turn 1")
        assert hit.start < question.stop + 32
        assert hit.stop > question.start - 32
    told = lighthouse.search("violet lighthouse", kinds=["document", "evidence"])
    assert {hit.kind for hit in told} == {"document"}
    assert told[0].start // 32 in blocks_of(lighthouse, "Agnes") | blocks_of(lighthouse, "green")
    assert lighthouse.search("violet lighthouse", kinds=["system"]) == []
    assert len(lighthouse.search("sea", top=3, kinds=["document"])) == 3
