"""Passages in order: what stands around a block, and how near to each other the words of a query are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from checks import words
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mc_runtime import Session
from mc_runtime.ranking import nearness, rank_blocks
from mc_runtime.segments import SegmentedBM25

Memory = Callable[..., Session]
WORDS = ("sea", "wind", "house", "keeper", "lamp", "night", "rain")
K1, B = 1.5, 0.75


def filled(docs: list[list[str]], loose: list[list[str]]) -> SegmentedBM25:
    index = SegmentedBM25(K1, B)
    index.add(docs[: len(docs) // 2])
    index.add(docs[len(docs) // 2 :], loose=loose)
    return index


def saturated(count: float, length: float, mean: float) -> float:
    return count / (count + K1 * (1 - B + B * length / mean))


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(WORDS), max_size=9), min_size=1, max_size=14),
    st.lists(st.lists(st.sampled_from(WORDS), max_size=9), max_size=2),
    st.lists(st.sampled_from((*WORDS, "zebra")), min_size=1, max_size=5),
    st.integers(1, 2),
    st.data(),
)
def test_scores_are_those_of_the_formula(
    docs: list[list[str]], loose: list[list[str]], query: list[str], around: int, data: st.DataObject
) -> None:
    index, texts = filled(docs, loose), docs + loose
    stop = data.draw(st.integers(1, len(texts)))
    blocks = sorted(data.draw(st.sets(st.integers(0, stop - 1), min_size=1)))
    weight = np.array(data.draw(st.lists(st.sampled_from((1.0, 0.5)), min_size=stop, max_size=stop)))
    scores = rank_blocks(index, query, np.array(blocks), [texts[b] for b in blocks], weight, around)

    asked = list(dict.fromkeys(query))
    idf = {}
    for word in asked:
        having = sum(word in text for text in texts)
        idf[word] = float(np.log1p((len(texts) - having + 0.5) / (having + 0.5))) if having else 0.0
    mean = sum(map(len, texts)) / len(texts)
    for block, score in zip(blocks, scores.tolist(), strict=True):
        counts: Counter[str] = Counter()
        for near in range(max(0, block - around), min(stop, block + around + 1)):
            for word, n in Counter(texts[near]).items():
                counts[word] += n * (1.0 if near == block else weight[near])  # type: ignore[assignment]
        length = sum(len(texts[near]) for near in range(max(0, block - around), min(stop, block + around + 1)))
        own = sum(idf[w] * saturated(texts[block].count(w), len(texts[block]), mean) for w in asked if idf[w])
        wide = sum(idf[w] * saturated(counts[w], length, mean * (2 * around + 1)) for w in asked if idf[w])
        close = nearness(texts[block], {w: (i, idf[w]) for i, w in enumerate(asked)}, K1)
        share = sum(idf[w] for w in asked if counts[w]) / max(sum(idf.values()), 1e-9)
        assert score == pytest.approx((own + wide / 2 + 0.375 * close) * (1 + share) / 2, abs=1e-9)


def test_nearness_counts_distance_and_order() -> None:
    asked = {"red": (0, 2.0), "fox": (1, 3.0), "runs": (2, 1.0)}

    def of(text: str) -> float:
        return nearness(text.split(), asked, K1)

    def pair(t: float, least: float) -> float:
        return least * (K1 + 1) * t / (K1 + t)

    assert of("red fox") == pytest.approx(pair(1.0, 2.0))
    assert of("fox red") == pytest.approx(pair(0.5, 2.0))  # the other way round
    assert of("red a fox") == pytest.approx(pair(0.25, 2.0))
    assert of("red a b c d fox") == pytest.approx(pair(1 / 25, 2.0))
    assert of("red a b c d e fox") == 0.0  # too far
    assert of("red red red") == 0.0
    assert of("red fox red") == pytest.approx(pair(1.5, 2.0))
    both = pair(1.0, 2.0) + pair(1.0, 1.0) + pair(0.25, 1.0)
    assert of("red fox runs") == pytest.approx(both)


def test_nothing_known_and_nothing_to_rank() -> None:
    index = filled([["sea"], ["wind"]], [])
    assert rank_blocks(index, ["zebra"], np.array([0, 1]), [["sea"], ["wind"]], np.ones(2), 1).tolist() == [0, 0]
    assert rank_blocks(index, [], np.array([0]), [["sea"]], np.ones(2), 1).tolist() == [0]
    assert rank_blocks(index, ["sea"], np.zeros(0, np.int64), [], np.ones(2), 1).tolist() == []


def test_the_right_one_of_many_facts_of_one_pattern_is_first(memory: Memory) -> None:
    """Keys of two words, each of which other keys have too."""
    firsts = ("red", "green", "violet", "silver", "golden", "purple", "orange", "crimson")
    seconds = ("fox", "boat", "lamp", "stone", "river", "castle", "garden", "window")
    keys = [f"{a}-{b}" for a in firsts for b in seconds]
    np.random.default_rng(0).shuffle(keys)
    session = memory(block_size=32, budget=256)
    session.ingest(" ".join(f"The number for {key} is {1000 + i}." for i, key in enumerate(keys)))
    index = session.retrieval

    def found(scores_of: Callable[[str], NDArray[np.float64]]) -> int:
        total = 0
        for i, key in enumerate(keys):
            best = int(scores_of(f"What is the number for {key}?").argmax())
            total += f"{key} is {1000 + i}." in index.text((best - 1) * 32, (best + 2) * 32)
        return total

    assert found(index.ranked) >= 57  # of 64
    assert found(index.scores) <= 52


def test_the_best_are_ranked_and_the_others_follow(memory: Memory) -> None:
    """Whatever was not looked at keeps BM25's order, below what was."""
    session = memory(block_size=16, budget=256)
    session.ingest(words(3000, seed=3))
    index, query = session.retrieval, "the keeper of the lamp and the wind"
    plain = index.scores(query)
    scores = index.ranked(query, most=8)
    order = np.argsort(-scores, kind="stable")
    assert len(scores) == len(plain) == session.tree.length // 16
    looked_at = np.argsort(-plain, kind="stable")[:16]  # more than was asked for: turns may take from their scores
    assert set(order[:16].tolist()) == set(looked_at.tolist())
    assert order[:16].tolist() != looked_at.tolist()
    rest = np.setdiff1d(np.arange(len(plain)), looked_at)
    assert (scores[rest] <= scores[looked_at].min()).all()
    assert np.array_equal(np.argsort(-scores[rest], kind="stable"), np.argsort(-plain[rest], kind="stable"))
    assert ((scores > 0) == (plain > 0)).all()
    assert not index.ranked("zebra quagga").any()
    assert len(index.ranked(query, stop=40)) == 40


def test_what_is_not_looked_at_counts_wherever_the_history_is_cut(memory: Memory) -> None:
    """The last block before the cut matches by its neighbours behind it alone."""
    session = memory(block_size=16, budget=256)
    session.ingest("ox ab cd ef gh ij kl mn op qr st uv wx yz bb cc dd ee ff gg hh " * 40)
    session.ingest("." * (48 - session.tree.length % 16))  # no word straddles the cut
    stop = session.tree.length // 16
    session.ingest("....." + "yak " * 4)
    index = session.retrieval
    has = np.array([bool(index.words("ox", i, i + 1)) for i in range(stop)])
    assert 40 <= has.sum() < stop
    scores = index.ranked("ox or yak", stop, most=8)
    assert (scores[has] > 0).all()
    assert np.isfinite(scores).all()
