"""Search over a memory's own blocks, while it grows."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
import pytest
from checks import words
from hypothesis import given
from hypothesis import strategies as st

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.retrieval import STRETCH, BlockIndex, best_first

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


def test_a_block_of_several_texts_is_of_the_one_that_has_most_of_it(memory: Memory) -> None:
    session = memory(block_size=32, budget=256)
    session.ingest("quagga " + words(35 - session.tree.length), title="before")
    start = session.tree.length
    assert start % 32 < 16
    session.ingest("zebra " + words(200), title="after")
    (hit,) = session.search("zebra", top=1)
    assert (hit.start, hit.source) == (start - start % 32, "after")


def test_words_at_the_ends_of_texts_are_found(memory: Memory) -> None:
    """Texts that were handed over without a space at their ends, and a question behind them."""
    session = memory(block_size=32, budget=256)
    for text in ("The cat is called Tom", "Alice likes tea, and has a quiet brother who is called Bob"):
        session.ingest(text)
    session.generate("who likes tea?", max_new_tokens=40)
    for word in ("Tom", "Alice", "Bob"):
        assert session.search(word), word
    assert session.search("TomAlice") == []


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


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.5]), max_size=40), st.integers(1, 12))
def test_best_first_is_a_stable_sort_cut_short(scores: list[float], most: int) -> None:
    array = np.asarray(scores)
    order = np.argsort(-array, kind="stable")
    assert best_first(array, most).tolist() == order[array[order] > 0][:most].tolist()


@pytest.mark.parametrize("length", [STRETCH * 9, STRETCH * 9 + 57])
@pytest.mark.parametrize("matching", [0.0005, 0.02, 1.0])
@pytest.mark.parametrize("distinct", [2, 50, 10**9])
def test_best_first_of_many_stretches(length: int, matching: float, distinct: int) -> None:
    """Some or all of them match; ties; the best at the very end, behind the last whole stretch."""
    rng = np.random.default_rng(int(length + distinct + 1e4 * matching))
    scores = np.where(rng.random(length) < matching, rng.integers(1, distinct + 1, length), 0).astype(np.float64)
    scores[-1] = distinct
    order = np.argsort(-scores, kind="stable")
    wanted = order[scores[order] > 0]
    for most in (1, 3, 9, 10, 64, length):
        assert best_first(scores, most).tolist() == wanted[:most].tolist()


def test_best_first_wants_at_least_one() -> None:
    with pytest.raises(InputError, match="most"):
        best_first(np.ones(3), 0)


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks that are read into an index, call by call."""
    counts: list[int] = []
    plain = BlockIndex._read

    def read(self: BlockIndex, first: int, stop: int) -> list[list[str]]:
        counts.append(stop - first)
        return plain(self, first, stop)

    monkeypatch.setattr(BlockIndex, "_read", read)
    return counts


def test_a_turn_reads_what_is_new_and_not_the_history(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(block_size=8)
    session.ingest(words(4000), mode="fast")
    counts, blocks = counted_reads(monkeypatch), session.tree.length // 8
    for question in ("what of the dog?", "and the sea?"):
        session.generate(question, max_new_tokens=20)
    assert 0 < sum(counts) <= session.tree.length // 8 - blocks + len(counts)


def test_a_reopened_memory_does_not_read_its_history_again(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(block_size=8)
    session.ingest(words(3000), mode="fast")
    session.generate("what of the dog?", max_new_tokens=20)
    expected = session.search("keeper of the lamp")
    session.close()
    counts = counted_reads(monkeypatch)
    again = memory(block_size=8)
    assert again.search("keeper of the lamp") == expected
    assert sum(counts) <= 2
    again.close()
    # Gone, it is made anew.
    for file in again.path.glob("search-*"):
        file.unlink()
    third = memory(block_size=8)
    assert third.search("keeper of the lamp") == expected
    assert sum(counts) > 300


def test_an_index_of_another_history_is_not_taken_up(memory: Memory) -> None:
    first, second = memory("first", block_size=8), memory("second", block_size=8)
    for session, seed in ((first, 1), (second, 2)):
        session.ingest(words(1000, seed), mode="fast")
    expected = second.search("keeper of the lamp")
    first.close()
    second.close()
    for file in first.path.glob("search-*"):
        assert (second.path / file.name).exists()
        shutil.copy(file, second.path / file.name)
    again = memory("second", block_size=8)
    assert again.search("keeper of the lamp") == expected


def test_turns_are_counted_per_block(memory: Memory) -> None:
    session = memory(block_size=8)

    def expected() -> list[int]:
        counts = np.zeros(session.tree.length // 8 + 1, np.int64)
        for document in session.tree.documents():
            if document.kind in ("user", "assistant"):
                counts[document.start // 8 : -(-document.stop // 8)] += 1
        return counts[: session.tree.length // 8].tolist()

    assert session.retrieval.turn_counts().tolist() == expected()
    for question in ("what of the dog?", "and the sea?", "the keeper?"):
        session.ingest(words(70))
        assert session.retrieval.turn_counts().tolist() == expected()
        pieces = session.generate(question, stream=True, max_new_tokens=30)
        for _ in pieces:  # the answer's document grows while it is counted
            assert session.retrieval.turn_counts().tolist() == expected()
    assert sum(expected()) > 10
