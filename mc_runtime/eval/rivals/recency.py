"""StreamingLLM (Xiao et al. 2023): the sink and the most recent tokens."""

from __future__ import annotations

import torch

from ..pasts import Kept, Past


class Recency:
    name = "recency (StreamingLLM)"

    def keep(self, past: Past, slots: int) -> Kept:
        first = past.far - slots
        position = torch.arange(first, past.far, device=past.ids.device).expand(past.batch, slots)
        return Kept(past.k[:, :, :, first:], past.v[:, :, :, first:], position)
