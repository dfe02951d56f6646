"""Focus on what would have helped with the text just read, by measurement and without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from mc_runtime.errors import InputError

from .attention import AttentionPolicy
from .blend import BlendPolicy
from .forest import base_slots
from .recency import RecencyPolicy
from .retrieval import RetrievalPolicy
from .view import Floats, FocusPolicy, FocusView, Ints, Utilities

if TYPE_CHECKING:
    from mc_runtime.context import WorkingContext


def recency_weights(count: int, decay: float) -> Floats:
    """[count] weights of tokens, oldest first, that fall by e every `decay` tokens into the past and sum to one."""
    weights: Floats = np.exp(-np.arange(count)[::-1] / decay)
    return weights / weights.sum()


class HindsightPolicy:
    """The newest `tokens` are read again with one block opened, or one opened block closed, at a time: a block is worth
    the nats per token that this saves. Newer tokens count more, by exp(-age / `decay`), since what is wanted moves on.

    Which gists are tried is what `shortlist` finds most promising, at most `candidates` of them; blocks that stand open
    and are not pinned are all tried. Each costs a forward of the `tokens`, and one of a block to open it: worth it for
    reading on, where nobody asks and no cheaper signal foresees what matters (docs/quality.md). Nothing is edited.
    """

    needs_mass = True

    def __init__(
        self, tokens: int = 64, decay: float = 16.0, candidates: int = 32, shortlist: FocusPolicy | None = None
    ) -> None:
        if tokens < 2:
            raise ValueError(f"tokens: expected at least 2 (one that predicts another), got {tokens}")
        if not decay > 0:
            raise ValueError(f"decay: expected a positive number of tokens, got {decay}")
        if candidates < 1:
            raise ValueError(f"candidates: expected at least 1, got {candidates}")
        self.tokens, self.decay, self.candidates = tokens, decay, candidates
        self.shortlist = shortlist or BlendPolicy(
            [(1.0, RetrievalPolicy(passages=8, sharpness=2.0)), (1.0, RecencyPolicy()), (1.0, AttentionPolicy())]
        )

    @torch.inference_mode()
    def utilities(self, view: FocusView) -> Utilities:
        from mc_runtime.context import WorkingContext  # which imports this package

        context = view.context
        if not isinstance(context, WorkingContext):
            raise InputError("policy: hindsight measures in a cache that can be edited; this context has none")
        newest = self._newest(context)
        if len(newest) < 2:
            return {}
        size, opened = context.config.block_size, view.expanded.get(1, np.zeros(0, np.int64))
        # Older tokens that are read again would be pulled from under the block that is tried.
        stop = int(context.entries.index[newest[0]]) // size
        closed = self._promising(view, stop)
        kept = opened[(opened > 0) & (opened < min(stop, view.recent_start // size))]
        base = self._loss(context, view.expanded, None, len(newest))
        nats = [base - self._loss(context, view.expanded, (int(block), True), len(newest)) for block in closed]
        nats += [self._loss(context, view.expanded, (int(block), False), len(newest)) - base for block in kept]
        blocks = np.concatenate((closed, kept))
        order = np.argsort(blocks)
        return {1: (blocks[order], np.asarray(nats, np.float64)[order])} if len(blocks) else {}

    def _newest(self, context: WorkingContext) -> Ints:
        """Ranks of the tokens at the end of the timeline that are judged by: no gist among them."""
        levels = context.entries.levels[-self.tokens :]
        gists = (levels > 0).nonzero()[0]
        first = len(context.entries) - len(levels) + (int(gists[-1]) + 1 if len(gists) else 0)
        return np.arange(first, len(context.entries))

    def _promising(self, view: FocusView, stop: int) -> Ints:
        """Sorted blocks before `stop` that are not open."""
        stored = min(view.context.tree.count(1), stop)
        blocks, nats = self.shortlist.utilities(view).get(1, (np.zeros(0, np.int64), np.zeros(0)))
        legal = (blocks > 0) & (blocks < stored) & ~np.isin(blocks, view.expanded.get(1, np.zeros(0, np.int64)))
        blocks, nats = blocks[legal], nats[legal]
        return np.sort(blocks[np.argsort(-nats, kind="stable")[: self.candidates]])

    def _loss(
        self, context: WorkingContext, expanded: dict[int, Ints], change: tuple[int, bool] | None, count: int
    ) -> float:
        """Weighted mean NLL of the newest `count` tokens, the first aside, after one change of the layout."""
        size = context.config.block_size
        layout = {level: nodes.copy() for level, nodes in expanded.items()}
        if change is not None:
            block, opens = change
            if opens:  # and what it lies under
                for level in range(1, context.tree.n_levels + 1):
                    node = block // size ** (level - 1)
                    if node < context.tree.count(level):
                        layout[level] = np.union1d(layout.get(level, np.zeros(0, np.int64)), [node])
            else:
                layout[1] = np.setdiff1d(layout[1], [block])
        # More than the budget where text has come in since the last layout: nothing has been closed for it yet.
        slots = base_slots(size, context.counts) + (size - 1) * sum(map(len, layout.values()))
        branch = context.fork(context.cache.widened(max(context.cache.capacity, slots)))
        branch.relayout(layout, mode="none")
        newest = np.arange(branch.used - count, branch.used)
        hidden = branch.run(newest).hidden[0, :-1]
        ids = branch.ids(branch.entries.index[newest[1:]])
        nll = torch.nn.functional.cross_entropy(context.decoder.logits(hidden).float(), ids, reduction="none")
        return float(nll.double().cpu().numpy() @ recency_weights(len(ids), self.decay))
