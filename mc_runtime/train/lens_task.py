"""Training of LensNet on labelled contexts.

    loss = huber((score - label) / t)              regression, in nats
         + rank * listwise                         cross-entropy of softmax(score / t) against softmax(label / t)
         + balance * (sum of scores - sum of labels)^2 / n^2 / t^2

t is the spread of a context's labels, at least `scale`: a question's answer is worth a hundred times a sentence's.
Labels are gate labels times a calibration to measured nats, one for gains and one for costs. The listwise term
(ListNet, Cao et al. 2007) is what decides which edit comes first; the balance keeps the sum of a context's predictions,
on which depends how much is opened at all, at that of its labels. Edits that are not legal or not labelled count
nowhere: the runtime masks them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import LensScoreWeights, lens_score

from .lens_augment import hide_mass, mix_up, put_far
from .lens_samples import LensExample

PREFIX = "lens/"
# Spreads beyond which the regression is linear. An answer is an outlier, five spreads and more above the rest, and
# which leaf holds it is often uncertain: a regression to the median would call it worth nothing.
OUTLIER = 8.0


@dataclass(frozen=True)
class LensTaskOptions:
    """gain, cost: nats measured per nat of a gate label. scale: least nats for t. rank, balance: weights of these
    terms. batch: contexts per micro-batch. questions: share of them that ask, where there are both kinds. mixed: share
    whose leaves are told apart by features alone; hidden: in which the mass of some leaves is not known; far: of the
    questions, that are put far behind their text (see `lens_augment`)."""

    gain: float = 0.21
    cost: float = 1.9
    scale: float = 0.02
    rank: float = 1.0
    balance: float = 0.1
    batch: int = 16
    questions: float = 0.5
    mixed: float = 0.5
    hidden: float = 0.5
    far: float = 0.7


class LensTask:
    """Loss of LensNet's scores; `parameters` are fp32, named as in `LensScoreWeights` behind `lens/`."""

    def __init__(
        self, weights: LensScoreWeights, examples: Sequence[LensExample], options: LensTaskOptions | None = None
    ) -> None:
        if not examples:
            raise ValueError("examples: expected at least one labelled context, got none")
        self.options, self.n_heads = options or LensTaskOptions(), weights.n_heads
        self._asking = [one for one in examples if one.asks]
        self._reading = [one for one in examples if not one.asks]
        self.parameters: dict[str, Tensor] = {
            PREFIX + name: x.detach().float().clone().requires_grad_() for name, x in weights.state_dict().items()
        }

    def weights(self, tensors: dict[str, Tensor] | None = None) -> LensScoreWeights:
        named = self.parameters if tensors is None else tensors
        fields = {name.removeprefix(PREFIX): x for name, x in named.items()}
        return LensScoreWeights(**fields, n_heads=self.n_heads)

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        weights, o = self.weights(), self.options
        chosen = [self._varied(self._draw(rng), rng) for _ in range(o.batch)]
        terms = [self.terms(score(one, weights), one.labels) for one in chosen]
        regression, ranking, balance = (torch.stack(parts).mean() for parts in zip(*terms, strict=True))
        loss = regression + o.rank * ranking + o.balance * balance
        figures = {"loss": loss, "regression": regression, "ranking": ranking, "balance": balance}
        return loss, {name: float(x.detach()) for name, x in figures.items()}

    def _draw(self, rng: random.Random) -> LensExample:
        if not self._asking or not self._reading:
            return rng.choice(self._asking or self._reading)
        return rng.choice(self._asking if rng.random() < self.options.questions else self._reading)

    def _varied(self, example: LensExample, rng: random.Random) -> LensExample:
        features, entries = example.features, example.entries
        if rng.random() < self.options.mixed:
            entries = mix_up(entries, rng)
        if rng.random() < self.options.hidden:
            features = hide_mass(features, rng)
        if example.asks and rng.random() < self.options.far:
            features = put_far(features, rng)
        return replace(example, entries=entries, features=features)

    def terms(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """scores, labels [n, 2] -> regression, listwise and balance terms of one context."""
        o = self.options
        nats = labels * labels.new_tensor([o.gain, o.cost])
        regression, ranking, balance = (scores.new_zeros(()) for _ in range(3))
        for column in range(2):
            here = nats[:, column].isfinite()
            values, found = nats[here, column], scores[here, column]
            if not len(values):
                continue
            t = (values.std() if len(values) > 1 else values.abs()[0]).clamp(min=o.scale)
            error = (found - values) / t
            regression = regression + F.huber_loss(error, torch.zeros_like(error), delta=OUTLIER)
            balance = balance + error.mean().square()
            target = torch.softmax(values / t, dim=0)
            log_p = torch.log_softmax(found / t, dim=0)
            ranking = ranking + (target * (target.clamp(min=1e-9).log() - log_p)).sum()
        return regression, ranking, balance


def score(example: LensExample, weights: LensScoreWeights) -> Tensor:
    """[n, 2] fp32, not masked: labels say what is legal."""
    return lens_score(example.entries, example.features, example.queries, weights)
