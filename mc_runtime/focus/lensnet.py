"""Focus by a trained network that scores the leaves of the Working Context in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .features import LensInputs, lens_inputs
from .view import Floats, FocusView, Utilities, utilities_of

if TYPE_CHECKING:
    from mc_runtime.lensnet import LensNet

# No edit is worth more; keeps what a net makes of inputs far from its training out of the allocator's arithmetic.
MOST_NATS = 1e3
# Gists above level 1 that are looked into at once, and rounds of doing so beyond one for each level.
LOOKED_INTO, MORE_ROUNDS = 8, 1
# An answer stands in one place, and text like it that is opened beside it misleads more than a passage missed costs.
NEARLY = 0.3


class LensNetPolicy:
    """A gist's utility is its expand gain. An expanded node's is the sum of the collapse costs of the leaves that it
    would swallow: nats add to first order, and a block of tokens is one leaf. A child that is itself expanded adds
    nothing here: it has a utility of its own, and its parent has to stay expanded with it.

    Above level 1 an expand gain says what lies under a gist, deep down. The most promising gists are looked into: the
    net scores the layout in which their children stand instead, and so on down. What is found there has the utility;
    a gist above level 1 has none of its own, so that nothing is opened for a promise that its children do not keep."""

    needs_mass = True

    def __init__(self, net: LensNet, *, nearly: float = NEARLY) -> None:
        """nearly: for a question, gists that promise less than this share of the best one's gain stay closed."""
        self.net, self.nearly = net, nearly

    @torch.inference_mode()
    def utilities(self, view: FocusView) -> Utilities:
        inputs = lens_inputs(view, self.net.mu)
        if not len(inputs):
            return {}
        scores = self._scores(inputs)
        collapse = inputs.legal[:, 1].cpu().numpy()
        level, index = inputs.parents()
        costs = level[collapse], index[collapse], scores[collapse, 1]

        layout = view.context.entries
        for _ in range(view.context.tree.n_levels + MORE_ROUNDS):
            promising = (inputs.levels > 1) & (scores[:, 0] > 0)
            if not promising.any():
                break
            best = np.argsort(-np.where(promising, scores[:, 0], -np.inf), kind="stable")[:LOOKED_INTO]
            layout = layout.with_children(inputs.rank[best[promising[best]]])
            inputs = lens_inputs(view, self.net.mu, layout=layout)
            scores = self._scores(inputs)
        first = inputs.levels == 1
        gain = scores[first, 0]
        if view.asked and len(gain):
            gain = np.where(gain >= self.nearly * gain.max(), gain, np.minimum(gain, 0.0))
        gains = inputs.levels[first], inputs.index[first], gain
        level, index, nats = (np.concatenate(pair) for pair in zip(gains, costs, strict=True))
        return utilities_of(level, index, nats)

    def _scores(self, inputs: LensInputs) -> Floats:
        """[N, 2] nats, finite."""
        scores: Floats = self.net.score(*inputs.tensors()).double().cpu().numpy()
        return np.nan_to_num(scores, nan=0.0).clip(-MOST_NATS, MOST_NATS)
