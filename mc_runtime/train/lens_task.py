"""Training of LensNet on labelled contexts.

    loss = huber((score - label) / s)                       regression, in nats
         + rank * sum over pairs of w log(1 + exp((score_j - score_i) / s))   where label_i > label_j
         + balance * (sum of scores - sum of labels)^2 / n^2 / s^2

s is a scale of nats, one for questions and one for continuations: an answer is worth a hundred times a sentence. It is
the same for every context of a kind: by each context's own spread those of little worth would count most, and scores
come out several times too small. The pairs' weights w are the differences of their labels, of sum 1: what decides is
which edit comes first (RankNet, Burges et al. 2005). The balance keeps the sum of a context's predictions, on which
depends how much is opened at all, at that of its labels. Labels are gate labels times a calibration to measured nats,
one for gains and one for costs, and at most `most`: the derivative at an answer that is very unlikely promises more
nats than there are. Edits that are not legal or not labelled count nowhere: the runtime masks them.
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
# Scales beyond which the regression is linear. An answer is an outlier, and which leaf holds it is often uncertain: a
# regression to the median would call it worth nothing.
OUTLIER = 8.0


@dataclass(frozen=True)
class LensTaskOptions:
    """gain, cost: nats measured per nat of a gate label. most: nats of a label, of either sign. scale, asking_scale:
    nats s of continuations and of questions. rank, balance: weights of these terms. batch: contexts per micro-batch.
    questions: share of them that ask, where there are both kinds. mixed: share whose leaves are told apart by features
    alone; hidden: in which the mass of some leaves is not known; far: of the questions, that are put far behind their
    text (see `lens_augment`)."""

    gain: float = 0.21
    cost: float = 1.9
    most: float = 2.0
    scale: float = 0.06
    asking_scale: float = 0.2
    rank: float = 0.1
    balance: float = 0.01
    batch: int = 16
    questions: float = 0.5
    mixed: float = 0.5
    hidden: float = 0.5
    far: float = 0.7

    def nats(self, labels: Tensor) -> Tensor:
        """[n, 2] gate labels as nats to be foreseen."""
        return (labels * labels.new_tensor([self.gain, self.cost])).clamp(-self.most, self.most)

    def scale_of(self, asks: bool) -> float:
        return self.asking_scale if asks else self.scale


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
        chosen = [vary(self._draw(rng), o, rng) for _ in range(o.batch)]
        terms = [self.terms(score(one, weights), one.labels, one.asks) for one in chosen]
        regression, ranking, balance = (torch.stack(parts).mean() for parts in zip(*terms, strict=True))
        loss = regression + o.rank * ranking + o.balance * balance
        figures = {"loss": loss, "regression": regression, "ranking": ranking, "balance": balance}
        return loss, {name: float(x.detach()) for name, x in figures.items()}

    def _draw(self, rng: random.Random) -> LensExample:
        if not self._asking or not self._reading:
            return rng.choice(self._asking or self._reading)
        return rng.choice(self._asking if rng.random() < self.options.questions else self._reading)

    def terms(self, scores: Tensor, labels: Tensor, asks: bool) -> tuple[Tensor, Tensor, Tensor]:
        """scores, labels [n, 2] -> regression, ranking and balance terms of one context."""
        o = self.options
        nats, scale = o.nats(labels), o.scale_of(asks)
        regression, ranking, balance = (scores.new_zeros(()) for _ in range(3))
        for column in range(2):
            here = nats[:, column].isfinite()
            values, found = nats[here, column] / scale, scores[here, column] / scale
            if not len(values):
                continue
            error = found - values
            regression = regression + F.huber_loss(error, torch.zeros_like(error), delta=OUTLIER)
            balance = balance + error.mean().square()
            ahead = (values[:, None] - values[None, :]).clamp(min=0)
            pairs = F.softplus(found[None, :] - found[:, None])
            ranking = ranking + (ahead * pairs).sum() / ahead.sum().clamp(min=1e-9)
        return regression, ranking, balance


def vary(example: LensExample, options: LensTaskOptions, rng: random.Random) -> LensExample:
    """The example as a longer memory would show it."""
    features, entries = example.features, example.entries
    if rng.random() < options.mixed:
        entries = mix_up(entries, rng)
    if rng.random() < options.hidden:
        features = hide_mass(features, rng)
    if example.asks and rng.random() < options.far:
        features = put_far(features, rng)
    return replace(example, entries=entries, features=features)


def score(example: LensExample, weights: LensScoreWeights) -> Tensor:
    """[n, 2] fp32, not masked: labels say what is legal."""
    return lens_score(example.entries, example.features, example.queries, weights)
