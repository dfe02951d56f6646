"""Focus on what is newest."""

from __future__ import annotations

import numpy as np

from .view import FocusView, Utilities


class RecencyPolicy:
    """A block that lies d blocks back is worth `scale / (1 + d / half_life)` nats. Only the newest blocks, about as
    many as the budget could hold twice, are given a value."""

    needs_mass = False

    def __init__(self, scale: float = 1.0, half_life: float = 16.0) -> None:
        self.scale, self.half_life = scale, half_life

    def utilities(self, view: FocusView) -> Utilities:
        context = view.context
        stored = context.tree.count(1)
        reach = 2 * context.config.budget // context.config.block_size
        index = np.arange(max(0, stored - reach), stored, dtype=np.int64)
        return {1: (index, self.scale / (1 + (stored - 1 - index) / self.half_life))} if len(index) else {}
