"""Focus on the passages whose words match what is asked (`BlockIndex.ranked`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..retrieval import CANDIDATES, LOOKED_AT, best_first
from ..tree import Tree
from ..turn_weights import TurnWeights
from .view import Floats, FocusView, Ints, Utilities

# A best score of this size counts half: below it, the query matches next to nothing.
HALF_SCORE = 2.0
# What is told later about the same may say it in fewer words: of the best score at least this share.
LATER_SHARE = 0.4


class RetrievalPolicy:
    """Opens the best passages: runs of neighbouring blocks around a block that matches.

    A fact needs the sentences around it, and every passage that is opened in vain distracts the model more than a
    missed one costs: few and whole passages beat many single blocks. The blocks of the best passage are worth up to
    `scale` nats each, those of others in proportion to their score to the power `sharpness`: with 20 they are opened
    beside the best one where they score nearly as well, about 5/6 of it. Text of the same pattern as the answer (the
    debts of a hundred people) distracts most; docs/quality.md has what other settings find.

    What was asked and answered counts less than what was told (`TurnWeights`). What is told since the conversation
    began (see `mc_runtime.told`) may correct what was known before: the newest such passage that holds all words of the
    question which the best one holds is opened with it.

    What stands word for word in a passage that is opened already (a text that was read twice, a quotation) is not
    opened again: it would take the place of another passage and say nothing new.

    passages: how many at most. before, after: blocks that a passage adds to its centre.
    """

    needs_mass = False

    def __init__(
        self, scale: float = 1.0, passages: int = 4, before: int = 1, after: int = 1, sharpness: float = 20.0
    ) -> None:
        self.scale, self.passages, self.sharpness = scale, passages, sharpness
        self.before, self.after = before, after

    def utilities(self, view: FocusView) -> Utilities:
        if not view.query.strip():
            return {}
        # Recent text is shown anyway; above all the question itself, which nothing matches better.
        stop = min(view.context.tree.count(1), view.recent_start // view.context.config.block_size)
        scores = view.retrieval.ranked(view.query, stop)
        if not scores.any():
            return {}
        candidates = best_first(scores, LOOKED_AT)
        weights = TurnWeights(view.retrieval, view.query, self.before, self.after)
        weights.weigh(scores, candidates)
        turns = view.retrieval.turn_counts()[:stop]
        if turns.any():
            self._raise_correction(weights, scores, candidates, int(turns.nonzero()[0][0]))
        blocks, best = self._passages(scores, view.context.tree)
        top = float(scores.max())
        nats = self.scale * top / (top + HALF_SCORE) * (best / top) ** self.sharpness
        return {1: (blocks, nats)}

    def _raise_correction(self, weights: TurnWeights, scores: Floats, candidates: Ints, first_turn: int) -> None:
        """Gives the newest correction of the best candidate, in place, that one's score. first_turn: the first block
        that has a part in the conversation."""
        best = int(scores.argmax())
        since = max(best + self.after + self.before, first_turn - 1)
        wanted = weights.told(best)
        later = [b for b in candidates.tolist() if b > since and scores[b] >= LATER_SHARE * scores[best]]
        correcting = [b for b in later if weights.told(b) >= wanted] if wanted else []
        if correcting:
            # Of neighbours, which hold the same words, the one that holds most of them itself.
            newest = [b for b in correcting if b >= max(correcting) - self.before - self.after]
            scores[max(newest, key=lambda b: float(scores[b]))] = scores[best]

    def _passages(self, scores: Floats, tree: Tree) -> tuple[Ints, Floats]:
        """Sorted blocks of the chosen passages, and the score of the best passage that each is in."""
        worth: dict[int, float] = {}
        texts: list[NDArray[np.integer]] = []
        size = tree.spec.block_size
        # A passage takes up its own blocks and no others; of the rest some may be repetitions.
        for centre in best_first(scores, max(CANDIDATES, self.passages * (self.before + 1 + self.after))):
            if len(texts) == self.passages:
                break
            if int(centre) in worth:
                continue
            own = tree.tokens(int(centre) * size, (int(centre) + 1) * size)
            if any(holds(text, own) for text in texts):
                continue
            passage = range(max(0, int(centre) - self.before), min(len(scores), int(centre) + self.after + 1))
            texts.append(tree.tokens(passage.start * size, passage.stop * size))
            for block in passage:
                worth.setdefault(block, float(scores[centre]))
        blocks = np.array(sorted(worth), np.int64)
        return blocks, np.array([worth[int(block)] for block in blocks])


def holds(text: NDArray[np.integer], part: NDArray[np.integer]) -> bool:
    """Whether the tokens of `part`, one at least, stand in `text` one after the other."""
    starts = (text[: len(text) - len(part) + 1] == part[0]).nonzero()[0] if len(part) <= len(text) else ()
    return any(np.array_equal(text[at : at + len(part)], part) for at in starts)
