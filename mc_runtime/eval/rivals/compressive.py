"""Compressive Transformer (Rae et al. 2020), mean pooling: the mean of keys and values of every far / slots tokens.

It is also what our pooled gists are before training.
"""

from __future__ import annotations

import torch

from ..pasts import Kept, Past
from . import KeepingRival


def span_centres(far: int, slots: int, device: torch.device) -> torch.Tensor:
    """Positions of entries that stand for far / slots tokens each, [slots] int64."""
    span = far // slots
    return torch.arange(slots, device=device) * span + (span - 1) // 2


def check_divides(far: int, slots: int) -> None:
    """Raises ValueError unless `slots` equal spans make up the far tokens."""
    if slots < 1 or far % slots:
        raise ValueError(f"slots: expected a divisor of {far} far tokens, got {slots}")


class MeanKV(KeepingRival):
    name = "mean K/V (Compressive)"

    def keep(self, past: Past, slots: int) -> Kept:
        check_divides(past.far, slots)
        k, v = (x.float().unflatten(3, (slots, -1)).mean(4).to(x) for x in (past.k, past.v))
        return Kept(k, v, span_centres(past.far, slots, past.ids.device).expand(past.batch, slots))
