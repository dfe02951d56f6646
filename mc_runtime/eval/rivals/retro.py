"""RETRO's schedule (Borgeaud et al. 2022): retrieve again every 64 tokens, with those 64 tokens as the query.

The paper reads what it retrieves through trained cross-attention. A frozen model has none: as in its in-context
descendants (Ram et al. 2023), what is retrieved is put in front of the recent tokens, in place of what was there, and
all that follows is run again. Retrieval is that of `bm25`, of which this differs by the schedule alone: after the
recent tokens, then wherever a multiple of 64 tokens has followed the far text.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mc_runtime.model.tokenizer import Tokenizer

from ..pasts import Past
from .bm25 import BM25Append


class Retro:
    """every: tokens between retrievals, and at most so many in a query."""

    ours, anew = False, True
    name = "BM25 anew (RETRO)"

    def __init__(self, tokenizer: Tokenizer, every: int = 64, chunk: int = 128) -> None:
        self.every, self.append = every, BM25Append(tokenizer, chunk)

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        follow, every = past.follow, self.every
        total = follow.shape[1]
        later = range((past.recent // every + 1) * every, total, every)
        starts = [past.recent, *later]
        parts: list[Tensor] = []
        for start, stop in zip(starts, [*later, total], strict=True):
            places = self.append.choose(past, slots, follow[:, max(0, start - max(every, past.recent)) : start])
            hidden = self.append.behind(past, places, follow[:, :stop], packed)
            # The state at start - 1 predicts the first token of the piece: it, too, sees what was just retrieved.
            parts.append(hidden[:, start - 1 :] if parts else hidden)
            if len(parts) > 1:
                parts[-2] = parts[-2][:, :-1]
        return torch.cat(parts, dim=1)
