"""Focus by a trained network that scores the leaves of the Working Context in nats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from .features import lens_inputs
from .view import FocusView, Utilities, utilities_of

if TYPE_CHECKING:
    from mc_runtime.lensnet import LensNet

# No edit is worth more; keeps what a net makes of inputs far from its training out of the allocator's arithmetic.
MOST_NATS = 1e3


class LensNetPolicy:
    """A gist's utility is its expand gain. An expanded node's is the sum of the collapse costs of the leaves that it
    would swallow: nats add to first order, and a block of tokens is one leaf. A child that is itself expanded adds
    nothing here: it has a utility of its own, and its parent has to stay expanded with it."""

    needs_mass = True

    def __init__(self, net: LensNet) -> None:
        self.net = net

    @torch.inference_mode()
    def utilities(self, view: FocusView) -> Utilities:
        inputs = lens_inputs(view, self.net.mu)
        if not len(inputs):
            return {}
        scores = self.net.score(*inputs.tensors()).double().cpu().numpy()
        scores = np.nan_to_num(scores, nan=0.0).clip(-MOST_NATS, MOST_NATS)
        expand, collapse = inputs.legal.cpu().numpy().T
        level, index = inputs.parents()
        return utilities_of(
            np.concatenate((inputs.levels[expand], level[collapse])),
            np.concatenate((inputs.index[expand], index[collapse])),
            np.concatenate((scores[expand, 0], scores[collapse, 1])),
        )
