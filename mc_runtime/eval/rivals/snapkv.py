"""SnapKV (Li et al. 2024): per layer and KV head, the exact tokens that the recent tokens attend to most.

The recent tokens are the paper's observation window. Votes of the query heads of a group are added up, since those
share their keys. The paper pools votes over neighbours (maximum, kernel 5 or 7), so that clusters are kept together.
"""

from __future__ import annotations

import torch

from ..pasts import Kept, Past, take
from . import KeepingRival


class SnapKV(KeepingRival):
    """kernel: width of the max pooling over neighbours (odd); 1: none."""

    def __init__(self, kernel: int = 1) -> None:
        self.kernel = kernel
        self.name = "attention mass" if kernel == 1 else f"SnapKV, kernel {kernel}"

    def keep(self, past: Past, slots: int) -> Kept:
        slots = min(slots, past.far - 1)
        mass = past.attention_mass.clone()
        if self.kernel > 1:
            flat = mass.flatten(0, 2)[:, None]
            mass = torch.nn.functional.max_pool1d(flat, self.kernel, 1, self.kernel // 2)[:, 0].view_as(mass)
        mass[..., 0] = -1.0  # the sink is there already
        index = mass.topk(slots, dim=-1).indices.sort(dim=-1).values
        # Heads keep different tokens: one position per slot is the mean of theirs.
        position = index.float().mean(dim=(0, 2)).round().long()
        return Kept(take(past.k, index), take(past.v, index), position)
