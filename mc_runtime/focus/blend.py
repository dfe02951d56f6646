"""A weighted sum of policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .attention import AttentionPolicy
from .recency import RecencyPolicy
from .retrieval import RetrievalPolicy
from .view import FocusPolicy, FocusView, Utilities, add_utilities


class BlendPolicy:
    """Utilities add up in nats, each part with its weight."""

    def __init__(self, parts: Sequence[tuple[float, FocusPolicy]], *, nearly: float = 0.0) -> None:
        """nearly: for a question, blocks worth less than this share of the best one, all parts added, stay closed."""
        self.parts, self.nearly = tuple(parts), nearly
        self.needs_mass = any(policy.needs_mass for weight, policy in self.parts if weight)

    @classmethod
    def default(cls) -> BlendPolicy:
        """Retrieval, and attention mass for the few gists that stand out. What the latter opens distracts a small model
        (docs/quality.md): it answers more when retrieval alone opens passages, which is the default."""
        return cls([(1.0, RetrievalPolicy()), (0.05, AttentionPolicy())])

    @classmethod
    def reading(cls) -> BlendPolicy:
        """For reading on where nobody asks: what matches the newest text, and the newest blocks in the slots that are
        left. For an answer those would distract."""
        return cls([(1.0, RetrievalPolicy()), (0.1, RecencyPolicy())])

    def utilities(self, view: FocusView) -> Utilities:
        added = add_utilities((weight, policy.utilities(view)) for weight, policy in self.parts if weight)
        if not view.asked:
            return added
        if 1 in added:
            blocks, nats = added[1]
            added[1] = blocks, np.where(nats >= self.nearly * nats.max(), nats, np.minimum(nats, 0.0))
        return added
