"""Focus policies that only an evaluation can have: one that knows where the answer is, one that knows nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from mc_runtime.focus.view import FocusView, Utilities


class EvidencePolicy:
    """Opens the blocks that hold given token spans, `scale` nats each, and nothing else."""

    needs_mass = False

    def __init__(self, spans: Sequence[tuple[int, int]], scale: float = 1.0) -> None:
        self.spans, self.scale = list(spans), scale

    def utilities(self, view: FocusView) -> Utilities:
        size, stored = view.context.config.block_size, view.context.tree.count(1)
        runs = [np.arange(start // size, -(-stop // size), dtype=np.int64) for start, stop in self.spans]
        blocks = np.unique(np.concatenate(runs)) if runs else np.zeros(0, np.int64)
        blocks = blocks[blocks < stored]
        return {1: (blocks, np.full(len(blocks), self.scale))} if len(blocks) else {}


class RandomPolicy:
    """Opens `passages` runs of `blocks` neighbouring blocks, drawn by the question: as many as retrieval opens."""

    needs_mass = False

    def __init__(self, passages: int = 4, blocks: int = 2, scale: float = 1.0) -> None:
        self.passages, self.blocks, self.scale = passages, blocks, scale

    def utilities(self, view: FocusView) -> Utilities:
        stored = view.context.tree.count(1)
        if stored == 0:
            return {}
        # What is asked, and not the text generated since: the same passages stay open for the whole turn.
        asked = view.query.split("\n", 1)[0]
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(asked.encode()).digest()[:8], "big"))
        starts = rng.integers(0, stored, self.passages)
        nodes = np.unique((starts[:, None] + np.arange(self.blocks)).clip(max=stored - 1))
        return {1: (nodes.astype(np.int64), np.full(len(nodes), self.scale))}
