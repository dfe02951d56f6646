"""Labelled contexts as longer memories would show them: what training texts of some thousand tokens cannot have.

A layout that LensNet only thinks of has leaves without attention mass, and a question may be asked a million tokens
after its answer. Neither changes what a label says: a leaf's gain is the same whether its mass is known, and the place
of an answer does not matter to a question (it does to a continuation, whose features stay).
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from mc_runtime.focus.features import FEATURES

MASS = tuple(i for i, name in enumerate(FEATURES) if "mass" in name)
DISTANCE, RANK_DISTANCE, PLACE, FIRST = (
    FEATURES.index(name) for name in ("log_distance_over_8", "log_rank_distance_over_8", "place", "is_first")
)
# Most tokens, and most entries, that are put before a history and between it and its question.
MOST_TOKENS, MOST_ENTRIES = 1e6, 2000.0


def hide_mass(features: Tensor, rng: random.Random) -> Tensor:
    """features [n, F] with the mass of a random share of the leaves unknown."""
    share = rng.random()
    hidden = torch.tensor([rng.random() < share for _ in range(len(features))], device=features.device)
    columns = torch.zeros(len(FEATURES), dtype=torch.bool, device=features.device)
    columns[list(MASS)] = True
    return features.masked_fill(hidden[:, None] & columns, 0.0)


def mix_up(entries: Tensor, rng: random.Random) -> Tensor:
    """entries [n, E] in another order, so that they say nothing of their leaves: some hundred contexts are soon known
    by heart, and what was learned so says nothing about other texts."""
    order = list(range(len(entries)))
    rng.shuffle(order)
    return entries[torch.tensor(order, dtype=torch.int64, device=entries.device)]


def put_far(features: Tensor, rng: random.Random) -> Tensor:
    """features [n, F] with text around the leaves, none to `MOST_TOKENS`: behind the first leaf, and at the end."""
    before, after = (math.expm1(rng.random() * math.log1p(MOST_TOKENS)) for _ in range(2))
    entries = math.expm1(rng.random() * math.log1p(MOST_ENTRIES))
    out, first = features.clone(), features[:, FIRST] > 0
    distance = torch.expm1(8 * features[:, DISTANCE])
    # Length of the history as these rows tell it: the farthest leaf's distance is close to it.
    length = float(distance.max()) + 1.0
    start = features[:, PLACE] * length
    out[:, DISTANCE] = torch.log1p(distance + after + first * before) / 8
    out[:, RANK_DISTANCE] = torch.log1p(torch.expm1(8 * features[:, RANK_DISTANCE]) + entries) / 8
    out[:, PLACE] = torch.where(first, start, start + before) / (length + before + after)
    return out
