"""BM25 over the tree's own blocks. Words are found and stemmed by the library `bm25s`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from numpy.typing import NDArray

from .errors import InputError
from .model import Tokenizer
from .profiling import timed
from .ranking import AROUND_TOKENS, rank_blocks
from .segments import SegmentedBM25
from .told import OVERLAP, ToldWords
from .tree import Tree

K1, B = 1.5, 0.75
# A fact often straddles two blocks, and a block alone names neither its subject nor its topic: a block also counts
# what its neighbours score.
NEIGHBOUR_SHARE = 0.5
# Blocks read at once: bounds the memory that a long text takes on its way into the index.
READ_BLOCKS = 4096
# What a user and the model said, as `Document.kind` has it.
TURN_KINDS = frozenset({"user", "assistant"})


@dataclass(frozen=True)
class Hit:
    """A span of the history that matches a query. start, stop: tokens; score: BM25; source: title of the document
    that has most of it."""

    start: int
    stop: int
    score: float
    text: str
    source: str | None


def best_first(scores: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Places of the `most` largest scores above 0, largest first; of equal ones the earliest. No sort of them all."""
    if most < 1:
        raise InputError(f"most: expected at least 1, got {most!r}")
    found = (scores > 0).nonzero()[0]
    if len(found) > most:
        least = np.partition(scores[found], -most)[-most]
        found = found[scores[found] >= least]
    return found[np.argsort(-scores[found], kind="stable")][:most]


def _stems(texts: Sequence[str], stemmer: Stemmer.Stemmer) -> list[list[str]]:
    stems: list[list[str]] = bm25s.tokenize(
        list(texts), stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
    )
    return stems


def _with_neighbours(own: NDArray[np.float64]) -> NDArray[np.float64]:
    result = own.copy()
    result[1:] += NEIGHBOUR_SHARE * own[:-1]
    result[:-1] += NEIGHBOUR_SHARE * own[1:]
    return result


def score_blocks(tokenizer: Tokenizer, ids: NDArray[np.integer], size: int, query: str) -> NDArray[np.float64]:
    """[len(ids) // size]: what a `BlockIndex` over a history of these tokens alone gives."""
    stemmer = Stemmer.Stemmer("english")
    spans = [(max(0, i - OVERLAP), i + size + OVERLAP) for i in range(0, len(ids) // size * size, size)]
    words = _stems([query], stemmer)[0]
    if not words or not spans:
        return np.zeros(len(spans))
    index = SegmentedBM25(K1, B)
    index.add(_stems([tokenizer.decode(ids[a:b].tolist()) for a, b in spans], stemmer))
    return _with_neighbours(index.scores(words))


class BlockIndex:
    """Scores every complete block of K tokens against a text. `update` follows the tree as it grows.

    directory: the memory's, in which `save` keeps the index; None keeps it nowhere.
    """

    def __init__(self, tree: Tree, tokenizer: Tokenizer, directory: Path | None = None) -> None:
        self.tree, self.tokenizer = tree, tokenizer
        self._directory = directory
        self._stemmer = Stemmer.Stemmer("english")
        self._index = SegmentedBM25(K1, B)
        self._length = 0  # of the history that is indexed
        self._turns = _TurnCounts(tree)
        self._told = ToldWords(tree, tokenizer, lambda texts: _stems(texts, self._stemmer))
        if directory is not None:
            self._index.load(directory, self._settled(tree.length), self._about)

    def _settled(self, length: int) -> int:
        """Blocks of a history of `length` tokens that stay as they are read: the words that straddle their end are
        complete."""
        return max(0, length - OVERLAP) // self.tree.spec.block_size

    def _about(self, blocks: int) -> dict[str, str]:
        """What tells an index of the first `blocks` blocks from that of another history."""
        size, first = self.tree.spec.block_size, self.tree.document_at(0)
        last = self.tree.tokens(max(0, blocks - 1) * size, blocks * size)
        return {
            "tree": f"{first.created if first is not None else 0.0!r}",
            "tokenizer": self.tree.spec.tokenizer,
            "block_size": str(size),
            "last_block": hashlib.sha256(last.tobytes()).hexdigest(),
        }

    def save(self) -> None:
        """Keep the index on disk, so that the next start need not read the history again."""
        if self._directory is not None:
            self._index.save(self._directory, self._about)

    def text(self, start: int, stop: int) -> str:
        """The text of a span of tokens, cut to the history."""
        return self.tokenizer.decode(self.tree.tokens(max(start, 0), min(stop, self.tree.length)).tolist())

    def _read(self, first: int, stop: int) -> list[list[str]]:
        """Stems of blocks [first, stop)."""
        return self._stems_of(range(first, stop))

    def _stems_of(self, blocks: Iterable[int]) -> list[list[str]]:
        size = self.tree.spec.block_size
        texts = [self.text(i * size - OVERLAP, (i + 1) * size + OVERLAP) for i in blocks]
        return _stems(texts, self._stemmer) if texts else []

    def update(self) -> None:
        """Index what is new in the tree; costs what the new text costs. A block is read again once the words that
        straddle its end are complete, so that the index depends on the history alone and not on when it was made."""
        length = self.tree.length
        if length == self._length:
            return
        with timed("index"):
            settled = self._settled(length)
            for first in range(len(self._index), settled, READ_BLOCKS):
                self._index.add(self._read(first, min(first + READ_BLOCKS, settled)))
            self._index.add([], loose=self._read(settled, length // self.tree.spec.block_size))
            self._length = length

    def scores(self, query: str) -> NDArray[np.float64]:
        """[blocks] BM25 of each block's text plus a share of its neighbours'; 0 for blocks that came after the last
        `update`, which has its place at the start of a turn, not at every refocus."""
        if not self._length:
            self.update()
        own = np.zeros(self.tree.length // self.tree.spec.block_size)
        stems = _stems([query], self._stemmer)[0]
        if not stems:
            return own
        found = self._index.scores(stems)
        own[: len(found)] = found
        return _with_neighbours(own)

    def rank(
        self, query: str, blocks: NDArray[np.int64], weight: NDArray[np.float64] | None = None
    ) -> NDArray[np.float64]:
        """[n]: how well each of `blocks` [n], a few that `scores` found, in ascending order, matches a text, with what
        stands around it and how near the words are to each other (see `mc_runtime.ranking`).

        weight: [m] what the words of each of the first m blocks count around others; behind those nothing counts. None:
        all alike.
        """
        size, stems = self.tree.spec.block_size, _stems([query], self._stemmer)[0]
        indexed = self._length // size
        weight = np.ones(indexed) if weight is None else weight[:indexed]
        around = max(1, AROUND_TOKENS // size)
        return rank_blocks(self._index, stems, blocks, self._stems_of(blocks.tolist()), weight, around)

    def turn_counts(self) -> NDArray[np.int64]:
        """[blocks] how many prompts and answers have a part in each block; not to be written to."""
        return self._turns.update()

    def words(self, query: str, first: int, stop: int) -> frozenset[str]:
        """Stems of a query's words that stand in blocks [first, stop), which may reach beyond the history."""
        size = self.tree.spec.block_size
        texts = [query, self.text(first * size - OVERLAP, stop * size + OVERLAP)]
        asked, found = _stems(texts, self._stemmer)
        return frozenset(asked) & frozenset(found)

    def told_words(self, query: str, first: int, stop: int) -> frozenset[str]:
        """Those of `words` that are told there, and not asked or answered (see `mc_runtime.told`)."""
        size = self.tree.spec.block_size
        return frozenset(_stems([query], self._stemmer)[0]) & self._told.of(first * size, stop * size)

    def _source(self, start: int, stop: int) -> str | None:
        """Title of the document that has most of a span; of equal ones the first."""
        most, title = 0, None
        while start < stop and (document := self.tree.document_at(start)) is not None:
            end = min(document.stop, stop)
            if end - start > most:
                most, title = end - start, document.title
            start = end
        return title

    def search(self, query: str, top: int = 8) -> list[Hit]:
        """The best blocks, best first; blocks that match nothing are left out."""
        self.update()
        size, scores = self.tree.spec.block_size, self.scores(query)
        hits = []
        for block in best_first(scores, top):
            start, stop = int(block) * size, (int(block) + 1) * size
            hits.append(Hit(start, stop, float(scores[block]), self.text(start, stop), self._source(start, stop)))
        return hits


class _TurnCounts:
    """Counts, per block, the documents that are part of the conversation, reading only those that are new."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._counts = np.zeros(0, np.int64)
        self._from = 0  # first token of the last document seen: the only one that can still have grown
        self._last = (0, 0)  # blocks counted for it

    def update(self) -> NDArray[np.int64]:
        size = self._tree.spec.block_size
        blocks = -(-self._tree.length // size)
        if blocks > len(self._counts):  # grown by half, so that growing costs no more than counting
            self._counts = np.concatenate((self._counts, np.zeros(max(blocks, len(self._counts) // 2), np.int64)))
        self._counts[slice(*self._last)] -= 1
        self._last = (0, 0)
        for document in self._tree.documents(self._from):
            if document.start == document.stop:
                continue
            self._from, self._last = document.start, (0, 0)
            if document.kind in TURN_KINDS:
                self._last = (document.start // size, -(-document.stop // size))
                self._counts[slice(*self._last)] += 1
        return self._counts[: self._tree.length // size]
