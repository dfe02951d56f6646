"""Focus on the blocks whose words match what is asked (BM25 over the tree's own blocks)."""

from __future__ import annotations

import numpy as np

from .view import FocusView, Utilities

# A best score of this size counts half: below it, the query matches next to nothing.
HALF_SCORE = 2.0


class RetrievalPolicy:
    """The best block is worth up to `scale` nats; others in proportion to their score to the power `sharpness`."""

    needs_mass = False

    def __init__(self, scale: float = 1.0, sharpness: float = 2.0, top: int = 64) -> None:
        self.scale, self.sharpness, self.top = scale, sharpness, top

    def utilities(self, view: FocusView) -> Utilities:
        if not view.query.strip():
            return {}
        scores = view.retrieval.scores(view.query)[: view.context.tree.count(1)]
        if not len(scores) or scores.max() <= 0:
            return {}
        best = np.sort(np.argsort(-scores, kind="stable")[: self.top])
        best = best[scores[best] > 0].astype(np.int64)
        top = float(scores.max())
        confidence = top / (top + HALF_SCORE)
        return {1: (best, self.scale * confidence * (scores[best] / top) ** self.sharpness)}
