"""InfLLM (Xiao et al. 2024): every layer attends to the blocks of the far text whose representative keys match best.

Representatives of a block: per KV head, the four keys that the `local` tokens after them attended to most. A block's
worth to a chunk of queries is the product of mean representative and mean query, summed over the heads. The prompt
(here: the recent tokens) is one chunk; while decoding (here: the targets) every token chooses for itself. All heads of
a layer see the same blocks. Blocks are 128 tokens long in the paper, where many fit; with few slots short ones do
better, down to single tokens. The paper gives far tokens one shared position; here they stand at their rank, as in the
other arms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pasts import Past
from .per_query import Choice, PerQueryRival

REPRESENTATIVES = 4


class InfLLM(PerQueryRival):
    """block: tokens per block. local: tokens whose attention makes a key representative."""

    def __init__(self, block: int = 4, local: int = 32) -> None:
        self.block, self.local = block, local
        self.name = "token top-k (InfLLM)" if block == 1 else "block top-k (InfLLM)"
        self._codes: tuple[Past, int, Tensor] | None = None

    def choose(self, past: Past, layer: int, queries: Tensor, at: Tensor, slots: int, packed: bool) -> Choice:
        slots = min(slots, past.far)
        size = min(self.block, slots)
        codes = self._block_codes(past, size)[layer]  # [B, Hkv, blocks, D]
        asked = queries.float().unflatten(1, (codes.shape[1], -1)).sum(2)  # [B, Hkv, T, D]
        asked[:, :, : past.recent] = asked[:, :, : past.recent].mean(2, keepdim=True)
        worth = torch.einsum("bhtd,bhnd->btn", asked, codes)
        if size == 1:
            worth[..., 0] = float("-inf")  # a block that holds the sink alone
        best = worth.topk(min(slots // size, codes.shape[2]), dim=-1).indices.sort(dim=-1).values
        index = (best[..., None] * size + torch.arange(size, device=best.device)).flatten(2)
        known = (index > 0) & (index < past.far)  # the sink is there already; the last block may be short
        rank = known.cumsum(-1)
        position = at[0] - 1 - rank[..., -1:] + rank if packed else index
        position = position.masked_fill(~known, -1)
        return Choice(index.clamp(max=past.far - 1)[:, :, None], position)

    def _block_codes(self, past: Past, size: int) -> Tensor:
        """Mean of each block's representative keys, [L, B, Hkv, blocks, D] fp32; kept for the past seen last."""
        if self._codes is None or self._codes[0] is not past or self._codes[1] != size:
            short = -past.far % size
            votes = torch.nn.functional.pad(past.received(self.local), (0, short), value=float("-inf"))
            votes[..., 0] = float("-inf")  # the sink would represent the first block in every layer
            keys = torch.nn.functional.pad(past.k.float(), (0, 0, 0, short)).unflatten(3, (-1, size))
            votes = votes.unflatten(3, (-1, size))
            top = votes.topk(min(REPRESENTATIVES, size), dim=-1)
            found = keys.gather(4, top.indices[..., None].expand(*top.indices.shape, keys.shape[-1]))
            valid = top.values.isfinite()[..., None]
            codes = (found * valid).sum(4) / valid.sum(4).clamp(min=1)
            self._codes = (past, size, codes)
        return self._codes[2]
