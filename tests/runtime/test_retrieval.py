"""Search over a memory's own blocks, while it grows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from checks import words

from mc_runtime import Session
from mc_runtime.retrieval import BlockIndex

Memory = Callable[..., Session]
FACT = " The violet lighthouse is kept by Agnes. "


def planted(memory: Memory) -> Session:
    session = memory(block_size=32, budget=256)
    session.ingest(words(400, seed=1) + FACT + words(400, seed=2), title="logbook")
    return session


def test_a_planted_fact_is_found_first(memory: Memory) -> None:
    session = planted(memory)
    hits = session.search("Who keeps the violet lighthouse? Agnes?", top=5)
    assert 0 < len(hits) <= 5
    assert "violet" in hits[0].text + hits[1].text
    assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
    for hit in hits:
        assert hit.stop - hit.start == 32
        assert hit.start % 32 == 0
        assert hit.text == session.model.tokenizer.decode(session.tree.tokens(hit.start, hit.stop).tolist())
        assert hit.score > 0
    assert hits[0].source == "logbook"
    assert session.search("zebra quagga") == []


def test_the_index_follows_the_tree(memory: Memory) -> None:
    session = memory(block_size=32, budget=256)
    index = session.retrieval
    assert session.search("violet") == []
    for seed in range(3):
        session.ingest(words(170, seed=seed))
        assert len(index.scores("sea")) == session.tree.length // 32
    assert session.search("violet lighthouse") == []
    document = session.ingest(FACT * 2)
    hit = session.search("violet lighthouse")[0]
    assert document.start - 32 < hit.start < document.stop
    session.generate("is the mermaid asleep? the mermaid, the mermaid", max_new_tokens=12)
    hit = session.search("mermaid")[0]
    assert session.tree.document_at(hit.stop - 1).kind in ("user", "assistant")  # type: ignore[union-attr]


def test_an_index_that_grew_is_one_that_was_made_anew(memory: Memory) -> None:
    """Otherwise a reopened session would focus differently from one that stayed open."""
    session = memory(block_size=32, budget=256)
    session.ingest(words(64 - session.tree.length))
    for seed in range(12):
        session.ingest(words(64, seed))  # whole blocks: each is complete before its successor begins
        session.retrieval.update()
    new = BlockIndex(session.tree, session.model.tokenizer)
    for query in ("sea", "bread and rain", "the keeper of the house"):
        assert np.allclose(session.retrieval.scores(query), new.scores(query))


def test_texts_without_a_word(memory: Memory) -> None:
    session = memory(block_size=32, budget=256, system_prompt="a")
    session.ingest("the of and , . ! - ; " * 12)
    for query in ("the of", "!!!", "dog", "日本"):
        assert session.search(query) == []
        assert not session.retrieval.scores(query).any()
    session.generate("!!!", max_new_tokens=3)


def test_text_is_cut_to_the_history(memory: Memory) -> None:
    session = planted(memory)
    assert session.retrieval.text(-5, 10**6) == session.model.tokenizer.decode(session.tree.tokens().tolist())
