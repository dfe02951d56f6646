"""BM25 (Robertson & Zaragoza 2009) over documents that only ever come in at the end.

A single index would have to be made anew for every document, because each weight depends on how many documents there
are and how long they are on average. Here documents are kept in segments that hold counts alone; a query weighs them
with the statistics of all segments together, which gives what a single index gives. Segments of like size are merged,
as in a log-structured merge tree, up to `SEGMENT` documents: a document is merged at most log2(SEGMENT) times, and no
call does more work than one segment takes, however long the history.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .postings import Segment, word_keys

logger = logging.getLogger("mc_runtime")
SEGMENT = 1 << 14
"""Documents of a full segment. Merging the last two halves of one takes some 50 ms."""


class SegmentedBM25:
    """The Lucene variant, as `bm25s.BM25(method="lucene")`. k1, b: its parameters."""

    def __init__(self, k1: float, b: float) -> None:
        self.k1, self.b = k1, b
        self.segments: list[Segment] = []
        self._loose: Segment | None = None
        self._saved: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        """Documents, loose ones excluded."""
        return sum(len(segment) for segment in self.segments)

    def add(self, documents: Sequence[Sequence[str]], loose: Sequence[Sequence[str]] = ()) -> None:
        """Append documents, each a list of words. loose: further ones behind them, dropped by the next call."""
        done = 0
        while done < len(documents):
            room = SEGMENT - len(self) % SEGMENT  # full segments end at multiples of SEGMENT, whoever adds what when
            self.segments.append(Segment.build(documents[done : done + room]))
            done += room
            self._compact()
        self._loose = Segment.build(loose) if loose else None

    def _compact(self) -> None:
        """Merge from the end while the segment before is not larger, or the last one of a full segment has come."""
        complete = len(self) % SEGMENT == 0
        while len(self.segments) > 1:
            before, last = self.segments[-2:]
            if len(before) + len(last) > SEGMENT or not (complete or len(before) <= len(last)):
                break
            self.segments[-2:] = [Segment.merge((before, last))]

    def scores(self, words: Sequence[str]) -> NDArray[np.float64]:
        """[documents, loose ones included]: BM25 against a query; a word that is asked twice counts twice."""
        parts, asked = self._parts(), Counter(words)
        found, weight = self._find(parts, list(asked))
        result = np.zeros(sum(map(len, parts)))
        if not weight.any():
            return result
        weight *= np.fromiter(asked.values(), np.float64, len(asked))
        mean_length = self.mean_length()
        at = 0
        for part, (start, stop) in zip(parts, found, strict=True):
            result[at : at + len(part)] = self._part_scores(part, start, stop, weight, mean_length)
            at += len(part)
        return result

    def _parts(self) -> list[Segment]:
        return [*self.segments, *([self._loose] if self._loose is not None else [])]

    def _find(
        self, parts: Sequence[Segment], words: Sequence[str]
    ) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], NDArray[np.float64]]:
        """Of each part, start and stop of the postings of each word; and the words' weights [q]."""
        keys = word_keys(words)
        found = [part.find(keys) for part in parts]
        frequency = sum((stop - start for start, stop in found), np.zeros(len(keys), np.int64))
        documents = sum(map(len, parts))
        return found, np.where(frequency > 0, np.log1p((documents - frequency + 0.5) / (frequency + 0.5)), 0.0)

    def mean_length(self) -> float:
        """Words of a document, loose ones included; 0 if there is none."""
        parts = self._parts()
        return sum(int(part.lengths.sum()) for part in parts) / max(sum(map(len, parts)), 1)

    def weights(self, words: Sequence[str]) -> NDArray[np.float64]:
        """[q]: inverse document frequency of each word; 0 for one that no document has."""
        return self._find(self._parts(), words)[1]

    def counts(self, words: Sequence[str], documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """[q, n]: how often each word stands in each of `documents` [n], which are numbered from the first one on, with
        loose ones behind the others, and ascend."""
        parts = self._parts()
        found, _ = self._find(parts, words)
        ends = np.cumsum([0, *map(len, parts)])
        at = np.searchsorted(documents, ends)
        result = np.zeros((len(words), len(documents)), np.int64)
        for part, spans, first, a, b in zip(parts, found, ends[:-1], at[:-1], at[1:], strict=True):
            if a == b:
                continue
            wanted = documents[a:b] - first
            for word, (start, stop) in enumerate(zip(*spans, strict=True)):
                docs = part.docs[start:stop]
                place = np.searchsorted(docs, wanted)
                known = place < len(docs)
                known[known] = docs[place[known]] == wanted[known]
                result[word, a:b][known] = part.counts[start:stop][place[known]]
        return result

    def lengths(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n]: words of each of `documents`, as for `counts`."""
        return np.concatenate([part.lengths for part in self._parts()])[documents].astype(np.int64)

    def norm(self, lengths: NDArray[Any], mean_length: float) -> NDArray[np.float64]:
        """[n], of texts of so many words: a word that stands there n times gives n / (norm + n) of its weight."""
        norm: NDArray[np.float64] = self.k1 * ((1 - self.b) + self.b / mean_length * lengths)
        return norm

    def _part_scores(
        self,
        part: Segment,
        start: NDArray[np.int64],
        stop: NDArray[np.int64],
        weight: NDArray[np.float64],
        mean_length: float,
    ) -> NDArray[np.float64]:
        """[n]: scores of one segment's documents. start, stop, weight [q]: postings and weight of each word asked."""
        spans = [slice(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)]
        docs = np.concatenate([part.docs[span] for span in spans])
        counts = np.concatenate([part.counts[span] for span in spans]).astype(np.float64)
        norm = self.norm(part.lengths, mean_length)
        gains = np.repeat(weight, stop - start) * counts / (norm[docs] + counts)
        return np.bincount(docs, gains, minlength=len(part)).astype(np.float64, copy=False)

    # -- on disk ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path, about: Callable[[int], dict[str, str]]) -> None:
        """Keep the segments in files. about: what `load` has to find for one that ends at the given document.

        An index can always be made anew: if it cannot be kept, a log line says so and nothing is raised.
        """
        if len(self.segments) > 1:
            full = sum(len(segment) == SEGMENT for segment in self.segments)
            self.segments[full:] = [Segment.merge(self.segments[full:])] if full < len(self.segments) else []
        start, names = 0, set()
        try:
            for segment in self.segments:
                span = (start, start + len(segment))
                path = directory / _file_name(*span)
                if span not in self._saved or not path.exists():
                    segment.save(path, about(span[1]))
                    self._saved.add(span)
                names.add(path.name)
                start = span[1]
            for path in directory.glob(_file_name("*", "*")):
                if path.name not in names:
                    path.unlink()
        except OSError as error:
            logger.warning("the search index was not kept (%s); it is made anew at the next start", error)

    def load(self, directory: Path, documents: int, about: Callable[[int], dict[str, str]]) -> None:
        """Take up, from the first document on, what was saved about this history of `documents`; stop at the first
        segment that does not fit."""
        found: dict[int, list[int]] = {}
        for path in directory.glob(_file_name("*", "*")):
            _, start, stop = path.stem.split("-", 2)
            if start.isdecimal() and stop.isdecimal():
                found.setdefault(int(start), []).append(int(stop))
        while (at := len(self)) in found:
            stops = [stop for stop in sorted(found[at], reverse=True) if at < stop <= documents]
            loaded = (Segment.load(directory / _file_name(at, stop), about(stop)) for stop in stops)
            whole = (s for s, stop in zip(loaded, stops, strict=True) if s is not None and len(s) == stop - at)
            segment = next(whole, None)
            if segment is None:
                break
            self.segments.append(segment)
            self._saved.add((at, at + len(segment)))


def _file_name(start: int | str, stop: int | str) -> str:
    return f"search-{start}-{stop}.safetensors"
