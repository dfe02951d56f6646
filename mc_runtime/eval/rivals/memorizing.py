"""Memorizing Transformers (Wu et al. 2022): in one layer, every query also attends to its nearest stored keys.

Each query head of the memory layer finds, for each token, the k = 32 stored keys with the largest product, and attends
to them and to its window in one softmax. Stored keys are unrotated, so a retrieved one stands where the query stands.
All other layers see the window only. The paper learns a gate between memory and window; a frozen model has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pasts import Past
from .per_query import Choice, PerQueryRival


class Memorizing(PerQueryRival):
    """layer: which one has the memory; None: the middle one. k: neighbours, at most slots x layers."""

    def __init__(self, layer: int | None = None, k: int = 32) -> None:
        self.layer, self.k = layer, k
        self.name = "kNN (Memorizing Tr.)"

    def start(self, past: Past, slots: int, packed: bool) -> int:
        return 1 if packed else past.far  # nothing stands between the sink and the window

    def choose(self, past: Past, layer: int, queries: Tensor, at: Tensor, slots: int, packed: bool) -> Choice | None:
        n_layers = past.decoder.config.n_layers
        if layer != (n_layers // 2 if self.layer is None else self.layer):
            return None
        keys = past.k[layer][:, :, 1:].float()  # the sink is there already
        grouped = queries.float().unflatten(1, (keys.shape[1], -1))  # [B, Hkv, g, T, D]
        scores = torch.einsum("bhgtd,bhnd->bthgn", grouped, keys).flatten(2, 3)  # [B, T, Hq, far - 1]
        k = min(self.k, slots * n_layers, past.far - 1)
        index = 1 + scores.topk(k, dim=-1).indices
        return Choice(index, at[None, :, None].expand(past.batch, -1, k))
