"""StreamingLLM (Xiao et al. 2023, Efficient Streaming Language Models with Attention Sinks): first and last tokens.

The paper keeps four sinks. One is there in every arm; the other three are paid for with slots here. With few slots
those three are dear, so that `sinks=1` (all slots to the most recent tokens) is a rival of its own.
"""

from __future__ import annotations

import torch

from ..pasts import Kept, Past
from . import KeepingRival


class Recency(KeepingRival):
    """sinks: first tokens that are kept, the one of every arm included; at least one slot is left to recent tokens."""

    def __init__(self, sinks: int = 1) -> None:
        self.sinks = sinks
        self.name = "recency" if sinks == 1 else f"StreamingLLM, {sinks} sinks"

    def keep(self, past: Past, slots: int) -> Kept:
        slots = min(slots, past.far - 1)
        extra = max(0, min(self.sinks - 1, slots - 1))
        first = past.far - (slots - extra)
        index = torch.cat((torch.arange(1, 1 + extra), torch.arange(first, past.far))).to(past.ids.device)
        return Kept(past.k[:, :, :, index], past.v[:, :, :, index], index.expand(past.batch, slots))
