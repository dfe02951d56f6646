"""Search over the tree's own blocks. Words are found and stemmed by the library `bm25s`."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import Stemmer
from numpy.typing import NDArray

from .errors import InputError
from .hidden import hidden
from .model import Tokenizer
from .profiling import timed
from .ranking import AROUND_TOKENS, rank_blocks
from .segments import SegmentedBM25
from .told import OVERLAP, ToldWords
from .tree import Document, Tree
from .turn_weights import TURN_SHARE, TurnCounts, TurnWeights

# bm25s runs JAX once where it is installed, and JAX then takes three quarters of a GPU's memory; it is no faster for
# what is used here, words and stems.
with hidden("jax"):
    import bm25s

K1, B = 1.5, 0.75
# A fact often straddles two blocks, and a block alone names neither its subject nor its topic: a block also counts
# what its neighbours score.
NEIGHBOUR_SHARE = 0.5
# Blocks read at once: bounds the memory that a long text takes on its way into the index.
READ_BLOCKS = 4096
# Blocks that BM25 finds, of which the neighbours, and the order and the nearness of the words, are looked at.
CANDIDATES = 64
# Of those, the best first, that are asked what of a conversation is told there (`TurnWeights`).
LOOKED_AT = 16
# Scores of which the largest stands for all, where the best of very many are looked for.
STRETCH = 256


@dataclass(frozen=True)
class Hit:
    """A span of the history that matches a query. start, stop: tokens; score: see `BlockIndex.ranked`; source,
    kind: title and kind (`Document.kind`) of the document that has most of it."""

    start: int
    stop: int
    score: float
    text: str
    source: str | None
    kind: str | None


def _reached(scores: NDArray[np.float64], most: int) -> float:
    """What at least `most` scores reach, as far as the largest of each stretch tell; 0 where there are too few
    stretches. Two passes over millions of scores, where a partition of them takes ten times as long."""
    largest = scores[: len(scores) // STRETCH * STRETCH].reshape(-1, STRETCH).max(1)
    return float(np.partition(largest, -most)[-most]) if len(largest) >= most else 0.0


def best_first(scores: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Places of the `most` largest scores above 0, largest first; of equal ones the earliest. No sort of them all."""
    if most < 1:
        raise InputError(f"most: expected at least 1, got {most!r}")
    least = _reached(scores, most)
    found = (scores >= least if least > 0 else scores > 0).nonzero()[0]
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
        self._turns = TurnCounts(tree)
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
            "text": "documents apart",  # how `text` reads them
            "block_size": str(size),
            "last_block": hashlib.sha256(last.tobytes()).hexdigest(),
        }

    def save(self) -> None:
        """Keep the index on disk, so that the next start need not read the history again."""
        if self._directory is not None:
            self._index.save(self._directory, self._about)

    def text(self, start: int, stop: int) -> str:
        """The text of a span of tokens, cut to the history. Where one document meets the next without a space, a line
        break stands between them: the last word of the one and the first of the other are two words."""
        at, stop, whole = max(start, 0), min(stop, self.tree.length), ""
        while at < stop:
            document = self.tree.document_at(at)
            end = stop if document is None else min(document.stop, stop)
            piece = self.tokenizer.decode(self.tree.tokens(at, end).tolist())
            meet = whole and piece and not (whole[-1].isspace() or piece[0].isspace())
            whole, at = whole + ("\n" if meet else "") + piece, end
        return whole

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

    def ranked(self, query: str, stop: int | None = None, most: int = CANDIDATES) -> NDArray[np.float64]:
        """[blocks, or the first `stop`] how well each block, with what stands around it, matches a text.

        The `most` best of `scores`, and some more where there are turns, have the scores of `mc_runtime.ranking`; the
        others follow in their order, none above those. What is behind `stop` counts nowhere, and around others what was
        asked and answered counts less than what was told.
        """
        found, size = self.scores(query)[:stop], self.tree.spec.block_size
        turns = self.turn_counts()[: len(found)]
        weight, parts = np.ones(len(found)), turns.nonzero()[0]  # few: a power of every block would take longest
        weight[parts] = TURN_SHARE ** turns[parts].astype(np.float64)
        blocks = np.union1d(best_first(found * weight, most), best_first(found, LOOKED_AT))
        if not len(blocks):
            return found
        best = rank_blocks(
            self._index, _stems([query], self._stemmer)[0], blocks, self._stems_of(blocks.tolist()),
            weight[: self._length // size], max(1, AROUND_TOKENS // size),
        )  # fmt: skip
        found[blocks] = 0.0
        # 0 where the words stand behind the stop alone.
        least = float(best[best > 0].min(initial=np.inf))
        found *= min(1.0, least / max(float(found.max()), 1e-9))
        found[blocks] = best
        return found

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

    def _document(self, start: int, stop: int, kinds: Collection[str] | None, words: frozenset[str]) -> Document | None:
        """The document that has most of a block [start, stop); of equal ones the first. kinds: one of these, that
        holds one of `words` there or in the blocks beside it."""
        most, result, size = 0, None, stop - start
        at = start
        while at < stop and (document := self.tree.document_at(at)) is not None:
            end = min(document.stop, stop)
            if end - at > most and (kinds is None or document.kind in kinds):
                near = max(document.start, start - size), min(document.stop, stop + size)
                if kinds is None or not words.isdisjoint(_stems([self.text(*near)], self._stemmer)[0]):
                    most, result = end - at, document
            at = end
        return result

    def search(self, query: str, top: int = 8, kinds: Collection[str] | None = None) -> list[Hit]:
        """The best blocks, best first; blocks that match nothing are left out. What was asked and answered counts less
        than what was told (`TurnWeights`). kinds: none but blocks in which documents of these kinds match."""
        self.update()
        size, scores = self.tree.spec.block_size, self.ranked(query, most=max(top, CANDIDATES))
        TurnWeights(self, query).weigh(scores, best_first(scores, max(top, LOOKED_AT)))
        words = frozenset(_stems([query], self._stemmer)[0])
        hits: list[Hit] = []
        for block in best_first(scores, top if kinds is None else len(scores) + 1):
            start, stop = int(block) * size, (int(block) + 1) * size
            document = self._document(start, stop, kinds, words)
            if document is None and kinds is not None:
                continue
            about = (None, None) if document is None else (document.title, document.kind)
            hits.append(Hit(start, stop, float(scores[block]), self.text(start, stop), *about))
            if len(hits) == top:
                break
        return hits
