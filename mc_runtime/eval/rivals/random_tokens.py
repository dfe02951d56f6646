"""Exact tokens drawn at random: what any choice must beat."""

from __future__ import annotations

import numpy as np
import torch

from ..pasts import Kept, Past
from . import KeepingRival


class RandomTokens(KeepingRival):
    """The draw depends on the seed and on the window's own tokens, not on how windows are batched."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.name = "random tokens"

    def keep(self, past: Past, slots: int) -> Kept:
        slots = min(slots, past.far - 1)
        rows = [
            np.sort(1 + np.random.default_rng([self.seed, *window]).permutation(past.far - 1)[:slots])
            for window in past.ids[:, : past.far].tolist()
        ]
        index = torch.from_numpy(np.stack(rows)).to(past.ids.device)  # [B, S]
        where = index[None, :, None, :, None].expand(*past.k.shape[:3], slots, past.k.shape[-1])
        return Kept(past.k.gather(3, where), past.v.gather(3, where), index)
