"""Counterfactual focus: measure what each expansion is worth for text that is still to come."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from mc_runtime.errors import InputError

from .view import FocusView, Utilities


class OraclePolicy:
    """The utility of a level-1 gist is the drop in mean NLL (nats per token) of known `targets`, read right after the
    present context, when that gist alone is expanded; of an expanded block, the rise when it is collapsed. Blocks of
    the pinned ends are not measured. One forward per node: for measurements, not for use."""

    needs_mass = False

    def __init__(self, targets: Sequence[int]) -> None:
        if len(targets) < 2:
            raise ValueError(f"targets: expected at least two token ids, got {len(targets)}")
        self.targets = list(targets)

    def _nll(self, view: FocusView, change: tuple[int, bool] | None) -> float:
        from mc_runtime.context import WorkingContext  # which imports this package

        context = view.context
        if not isinstance(context, WorkingContext):
            raise InputError("policy: the oracle measures in a cache that can be edited; this context has none")
        room = context.cache.capacity + context.config.block_size + len(self.targets)
        branch = context.fork(context.cache.widened(room))
        expanded = {level: nodes.copy() for level, nodes in view.expanded.items()}
        if change is not None:
            block, opens = change
            kept = expanded.get(1, np.zeros(0, np.int64))
            expanded[1] = np.union1d(kept, [block]) if opens else np.setdiff1d(kept, [block])
        branch.relayout(expanded, mode="none")
        hidden = branch.append(self.targets).hidden[0, :-1]
        logits = context.decoder.logits(hidden).float()
        return float(F.cross_entropy(logits, torch.tensor(self.targets[1:], device=logits.device)))

    @torch.inference_mode()
    def utilities(self, view: FocusView) -> Utilities:
        context, size = view.context, view.context.config.block_size
        base = self._nll(view, None)
        entries = context.entries
        gists = entries.index[entries.levels == 1]
        recent = (context.length - context.config.recent_tokens) // size
        opened = view.expanded.get(1, np.zeros(0, np.int64))
        opened = opened[(opened > 0) & (opened < recent)]
        gains = [base - self._nll(view, (int(block), True)) for block in gists]
        costs = [self._nll(view, (int(block), False)) - base for block in opened]
        index, values = np.concatenate((gists, opened)), np.asarray(gains + costs, np.float64)
        order = np.argsort(index)
        return {1: (index[order], values[order])} if len(index) else {}
