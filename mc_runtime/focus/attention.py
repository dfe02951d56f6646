"""Focus on what the model attends to, without training (as H2O, Zhang et al. 2023, and SnapKV, Li et al. 2024)."""

from __future__ import annotations

import numpy as np

from .view import FocusView, Utilities, utilities_of


class AttentionPolicy:
    """A gist is worth opening, and a node's children worth keeping, in proportion to the attention mass that they
    receive from the newest tokens; the node with the most gets `scale` nats. The first block is left out: as the
    attention sink it would drown the rest, and it is pinned anyway."""

    needs_mass = True

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def utilities(self, view: FocusView) -> Utilities:
        entries = view.context.entries
        if view.mass is None or not len(entries):
            return {}
        size = entries.block_size
        mass = view.mass.mean(axis=0)
        keep = entries.starts >= size
        level, index, mass = entries.levels[keep].astype(np.int64), entries.index[keep], mass[keep]
        # A gist's mass speaks for opening it; any entry's mass speaks for keeping its parent open.
        gist = level > 0
        levels = np.concatenate((level[gist], level + 1))
        nodes = np.concatenate((index[gist], index // size))
        values = np.concatenate((mass[gist], mass))
        counts = np.asarray([*view.context.counts, 0])
        stored = (levels < len(counts) - 1) & (nodes < counts[np.minimum(levels, len(counts) - 1)])
        result = utilities_of(levels[stored], nodes[stored], values[stored])
        top = max((float(nats.max()) for _, nats in result.values()), default=0.0)
        if top <= 0:
            return {}
        return {level: (nodes, self.scale * nats / top) for level, (nodes, nats) in result.items()}
