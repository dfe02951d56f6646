"""BM25 over segments: the scores of one index, whatever came in when; files that are taken up or refused."""

from __future__ import annotations

import logging
from pathlib import Path

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mc_runtime import segments
from mc_runtime.postings import FORMAT, Segment, word_keys
from mc_runtime.segments import SegmentedBM25

WORDS = ("sea", "wind", "house", "keeper", "lamp", "night", "rain", "bread", "dog", "hill", "boat", "stone")
documents = st.lists(st.lists(st.sampled_from(WORDS), max_size=9), max_size=24)


def about(stop: int) -> dict[str, str]:
    return {"history": "a", "stop": str(stop)}


def other(stop: int) -> dict[str, str]:
    return {"history": "b", "stop": str(stop)}


def random_documents(count: int, seed: int = 0) -> list[list[str]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(WORDS, rng.integers(0, 12)).tolist() for _ in range(count)]


def single_index(docs: list[list[str]], query: list[str]) -> NDArray[np.float64]:
    """What bm25s gives for all documents at once."""
    known = {word for d in docs for word in d}
    if not any(word in known for word in query):
        return np.zeros(len(docs))
    index = bm25s.BM25(k1=1.5, b=0.75)
    vocabulary = {word: i for i, word in enumerate(sorted(known))}
    index.index(([[vocabulary[word] for word in d] for d in docs], vocabulary), show_progress=False)
    return np.asarray(index.get_scores([word for word in query if word in known]), np.float64)


def check_segments(index: SegmentedBM25, size: int) -> None:
    """Full segments first, each at a multiple of its size; then smaller ones that shrink."""
    lengths = [len(segment) for segment in index.segments]
    full = lengths.count(size)
    assert lengths[:full] == [size] * full
    assert all(a > b for a, b in zip(lengths[full:], lengths[full + 1 :], strict=False))
    assert sum(lengths[full:]) < size


@settings(max_examples=200, deadline=None)
@given(
    st.lists(documents, max_size=8),
    documents,
    st.lists(st.sampled_from([*WORDS, "unknown"]), min_size=1, max_size=6),
    st.sampled_from([1, 8, 32]),
)
def test_scores_are_those_of_one_index(
    batches: list[list[list[str]]], loose: list[list[str]], query: list[str], size: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "SEGMENT", size)
        index = SegmentedBM25(1.5, 0.75)
        docs: list[list[str]] = []
        for batch in batches:
            index.add(batch, loose=loose)
            docs += batch
            check_segments(index, size)
        assert len(index) == len(docs)
        expected = single_index(docs + (loose if batches else []), query)
        assert np.allclose(index.scores(query), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(
    documents, documents, documents, st.lists(st.sampled_from((*WORDS, "zebra")), max_size=4, unique=True), st.data()
)
def test_counts_weights_and_lengths_are_those_of_the_documents(
    first: list[list[str]], second: list[list[str]], loose: list[list[str]], words: list[str], data: st.DataObject
) -> None:
    index = SegmentedBM25(1.5, 0.75)
    index.add(first)
    index.add(second, loose=loose)
    docs = first + second + loose
    chosen = sorted(data.draw(st.sets(st.integers(0, len(docs) - 1))) if docs else [])
    at = np.array(chosen, np.int64)
    assert index.counts(words, at).tolist() == [[docs[i].count(word) for i in chosen] for word in words]
    if docs:
        assert index.lengths(at).tolist() == [len(docs[i]) for i in chosen]
        assert index.mean_length() == pytest.approx(sum(map(len, docs)) / len(docs))
    for word, weight in zip(words, index.weights(words).tolist(), strict=True):
        having = sum(word in d for d in docs)
        assert weight == pytest.approx(np.log1p((len(docs) - having + 0.5) / (having + 0.5)) if having else 0.0)


def test_loose_documents_are_dropped_by_the_next_call() -> None:
    index = SegmentedBM25(1.5, 0.75)
    index.add([["sea"]], loose=[["dog"]])
    assert len(index) == 1
    assert (index.scores(["dog"]) > 0).tolist() == [False, True]
    index.add([["dog", "dog"]])
    assert (index.scores(["dog"]) > 0).tolist() == [False, True]
    assert len(index.scores(["sea"])) == 2


def test_nothing_known_gives_zeros() -> None:
    index = SegmentedBM25(1.5, 0.75)
    assert len(index.scores(["sea"])) == 0
    index.add([[], []])
    assert index.scores(["sea"]).tolist() == [0, 0]
    index.add([["sea"]])
    assert index.scores([]).tolist() == [0, 0, 0]


@given(st.lists(documents, min_size=1, max_size=4))
def test_merging_is_building_at_once(batches: list[list[list[str]]]) -> None:
    merged = Segment.merge([Segment.build(batch) for batch in batches])
    whole = Segment.build([d for batch in batches for d in batch])
    for name, array in vars(whole).items():
        assert np.array_equal(array, getattr(merged, name)), name
        assert array.dtype == getattr(merged, name).dtype


def test_words_keep_their_keys() -> None:
    """Files hold them: they may not depend on the process."""
    assert word_keys(["sea"]).tolist() == [-730283562963872271]
    assert len(set(word_keys(str(i) for i in range(10_000)).tolist())) == 10_000


def test_a_saved_index_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 16)
    folder, docs = tmp_path, random_documents(59)
    for stop in (23, 41, 59):  # saved again and again while it grows
        index = SegmentedBM25(1.5, 0.75)
        index.load(folder, stop, about)
        assert len(index) == {23: 0, 41: 23, 59: 41}[stop]
        index.add(docs[len(index) : stop])
        index.save(folder, about)
        names = sorted(path.name for path in folder.iterdir())
        full = [f"search-{i}-{i + 16}.safetensors" for i in range(0, stop // 16 * 16, 16)]
        assert names == sorted([*full, f"search-{stop // 16 * 16}-{stop}.safetensors"])
    loaded = SegmentedBM25(1.5, 0.75)
    loaded.load(folder, 59, about)
    assert np.allclose(loaded.scores(["sea", "dog"]), single_index(docs, ["sea", "dog"]), atol=1e-6)
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    loaded.save(folder, about)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 16)
    folder = tmp_path
    index = SegmentedBM25(1.5, 0.75)
    index.add(random_documents(40))
    index.save(folder, about)

    def taken(count: int = 40, what: object = about) -> int:
        found = SegmentedBM25(1.5, 0.75)
        found.load(folder, count, what)  # type: ignore[arg-type]
        return len(found)

    assert (taken(), taken(39), taken(31), taken(3)) == (40, 32, 16, 0)
    assert taken(what=other) == 0
    monkeypatch.setattr("mc_runtime.postings.FORMAT", FORMAT + 1)
    assert taken() == 0
    monkeypatch.undo()
    monkeypatch.setattr(segments, "SEGMENT", 16)
    damaged = folder / "search-16-32.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert taken() == 16
    damaged.unlink()
    (folder / "context.safetensors").write_text("not ours")
    (folder / "search-a-b.safetensors").write_bytes(b"")
    assert taken() == 16
    index.save(folder, about)
    assert taken() == 40
    assert len(list(folder.iterdir())) == 4


def test_an_index_that_cannot_be_kept_is_only_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = SegmentedBM25(1.5, 0.75)
    index.add(random_documents(5))
    with caplog.at_level(logging.WARNING, "mc_runtime"):
        index.save(tmp_path / "gone", about)
    assert "made anew" in caplog.text
    assert len(index.scores(["sea"])) == 5
