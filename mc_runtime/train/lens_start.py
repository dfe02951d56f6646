"""Where LensNet's training starts: the head fitted to the features alone.

What the features tell is most of what can be told, and a regression of single leaves finds it in seconds. Trained with
everything else from the first step, the head has to find them among projections of the entries, random at first, and
takes a hundred times as long. Afterwards these projections join with small weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import LensScoreWeights

from .lens_samples import LensExample
from .lens_task import LensTaskOptions, vary

STEPS, ROWS, LR, WEIGHT_DECAY = 1500, 1024, 1e-2, 1e-2
# Variants of each context: features hidden or put far, as in training.
VARIANTS = 3
# Size of what joins the features, over that of an untrained head's.
OTHERS = 0.03


def fit_head(
    weights: LensScoreWeights, examples: Sequence[LensExample], options: LensTaskOptions, seed: int = 0
) -> LensScoreWeights:
    """The weights (fp32) with a head that foresees `examples` from their features: least squares in units of the kind's
    scale, as many rows of questions as of continuations in a batch."""
    rng, device = random.Random(f"lens start {seed}"), weights.head_in.device
    generator = torch.Generator().manual_seed(seed)
    kinds = {asks: [one for one in examples if one.asks == asks] for asks in (True, False)}
    pools = [(options.scale_of(asks), *_rows(kind, options, rng)) for asks, kind in kinds.items() if kind]
    n, hidden = weights.n_features, weights.head_in.shape[0]
    head_in = (torch.randn(hidden, n, generator=generator) * max(n, 1) ** -0.5).to(device)
    head = [head_in, torch.zeros(hidden), torch.zeros(2, hidden), torch.zeros(2)]
    head = [x.to(device).requires_grad_() for x in head]
    optimizer = torch.optim.AdamW(head, lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
        loss = torch.zeros((), device=device)
        for scale, features, wanted in pools:
            rows = torch.randint(len(features), (ROWS,), generator=generator).to(device)
            found = F.silu(F.linear(features[rows], head[0], head[1])) @ head[2].T + head[3]
            known = wanted[rows].isfinite()
            error = torch.where(known, found - wanted[rows].nan_to_num(), 0.0) / scale
            loss = loss + error.square().sum() / known.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fitted = [x.detach() for x in head]
    others = weights.head_in.shape[1] - n
    joined = torch.cat((OTHERS * weights.head_in[:, :others], fitted[0]), dim=1)
    return replace(weights, head_in=joined, head_bias=fitted[1], head_out=fitted[2], head_out_bias=fitted[3])


def _rows(examples: Sequence[LensExample], options: LensTaskOptions, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Features [rows, F] and nats [rows, 2] of leaves of which something is known."""
    features, wanted = [], []
    for example in examples:
        labels = options.nats(example.labels)
        known = labels.isfinite().any(dim=1)
        for variant in range(VARIANTS):
            shown = example if variant == 0 else vary(example, options, rng)
            features.append(shown.features[known])
            wanted.append(labels[known])
    return torch.cat(features), torch.cat(wanted)
