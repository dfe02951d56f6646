"""What was asked and answered in a conversation counts less, where a history is searched, than what was told.

Earlier questions repeat the words of this one without knowing the answer, and a small model that sees its earlier
answers gives them again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .tree import Tree

if TYPE_CHECKING:
    from .retrieval import BlockIndex

# Share of its score that a block keeps for each question and answer that has a part in it.
TURN_SHARE = 0.5
# What a user and the model said, as `Document.kind` has it.
TURN_KINDS = frozenset({"user", "assistant"})


class TurnWeights:
    """For one query. A block that has a part in turns keeps of its score what its words that are told deserve (see
    `mc_runtime.told`): all of it where all are. before, after: blocks around one whose words count as its own."""

    def __init__(self, index: BlockIndex, query: str, before: int = 1, after: int = 1) -> None:
        self._index, self._query, self._before, self._after = index, query, before, after
        self._told: dict[int, frozenset[str]] = {}

    def told(self, block: int) -> frozenset[str]:
        """Stems of the query's words that are told in and around a block."""
        if block not in self._told:
            self._told[block] = self._index.told_words(self._query, block - self._before, block + self._after + 1)
        return self._told[block]

    def weigh(self, scores: NDArray[np.float64], candidates: NDArray[np.int64]) -> None:
        """Take from the scores of blocks [0, n), in place, what turns take from them. candidates: blocks of which the
        words are looked at; the others count as if nothing were told in them."""
        turns = self._index.turn_counts()[: len(scores)]
        plain, parts = scores[candidates], turns.nonzero()[0]  # few of many blocks
        scores[parts] *= TURN_SHARE ** turns[parts].astype(np.float64)
        for block, score in zip(candidates.tolist(), plain, strict=True):
            if turns[block]:
                words = self._index.words(self._query, block - self._before, block + self._after + 1)
                share = len(self.told(block)) / max(len(words), 1)
                scores[block] += (score - scores[block]) * min(share, 1.0)


class TurnCounts:
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
