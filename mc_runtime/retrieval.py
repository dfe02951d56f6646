"""BM25 over the tree's own blocks (Robertson & Zaragoza 2009; the library `bm25s`)."""

from __future__ import annotations

from dataclasses import dataclass

import bm25s
import numpy as np
import Stemmer
from numpy.typing import NDArray

from .model import Tokenizer
from .tree import Tree

K1, B = 1.5, 0.75
# A fact often straddles two blocks, and a block alone names neither its subject nor its topic: a block also counts
# what its neighbours score.
NEIGHBOUR_SHARE = 0.5
# Tokens decoded beyond a block's ends, so that a word that straddles them is whole in both.
OVERLAP = 4


@dataclass(frozen=True)
class Hit:
    """A span of the history that matches a query. start, stop: tokens; score: BM25."""

    start: int
    stop: int
    score: float
    text: str
    source: str | None


class BlockIndex:
    """Scores every complete block of K tokens against a text. `update` follows the tree as it grows."""

    def __init__(self, tree: Tree, tokenizer: Tokenizer) -> None:
        self.tree, self.tokenizer = tree, tokenizer
        self._stemmer = Stemmer.Stemmer("english")
        self._words: dict[str, int] = {}
        self._blocks: list[list[int]] = []
        self._index: bm25s.BM25 | None = None
        self._length = 0

    def text(self, start: int, stop: int) -> str:
        """The text of a span of tokens, cut to the history."""
        return self.tokenizer.decode(self.tree.tokens(max(start, 0), min(stop, self.tree.length)).tolist())

    def _stems(self, texts: list[str]) -> list[list[str]]:
        stems: list[list[str]] = bm25s.tokenize(
            texts, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return stems

    def update(self) -> None:
        """Index what is new in the tree. A block is read again once the words that straddle its end are complete, so
        that the index depends on the history alone and not on when it was made."""
        size, length = self.tree.spec.block_size, self.tree.length
        if length == self._length:
            return
        settled = min(len(self._blocks), max(0, self._length - OVERLAP) // size)
        del self._blocks[settled:]
        texts = [self.text(i * size - OVERLAP, (i + 1) * size + OVERLAP) for i in range(settled, length // size)]
        for stems in self._stems(texts) if texts else []:
            self._blocks.append([self._words.setdefault(stem, len(self._words)) for stem in stems])
        self._length = length
        if self._blocks:
            self._index = bm25s.BM25(k1=K1, b=B)
            self._index.index((self._blocks, self._words), show_progress=False)

    def scores(self, query: str) -> NDArray[np.float64]:
        """[blocks] BM25 of each block's text plus a share of its neighbours'; 0 for blocks that came after the last
        `update`, whose cost grows with the history: it has its place at the start of a turn, not at every refocus."""
        if self._index is None:
            self.update()
        own = np.zeros(self.tree.length // self.tree.spec.block_size)
        stems = [stem for stem in self._stems([query])[0] if stem in self._words]
        if self._index is None or not stems:
            return own
        own[: len(self._blocks)] = self._index.get_scores(stems)
        around = np.zeros_like(own)
        around[1:] += own[:-1]
        around[:-1] += own[1:]
        return own + NEIGHBOUR_SHARE * around

    def search(self, query: str, top: int = 8) -> list[Hit]:
        """The best blocks, best first; blocks that match nothing are left out."""
        self.update()
        size, scores = self.tree.spec.block_size, self.scores(query)
        order = np.argsort(-scores, kind="stable")[:top]
        hits = []
        for block in order[scores[order] > 0]:
            start, stop = int(block) * size, (int(block) + 1) * size
            document = self.tree.document_at(start)
            title = document.title if document is not None else None
            hits.append(Hit(start, stop, float(scores[block]), self.text(start, stop), title))
        return hits
