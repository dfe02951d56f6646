"""Rivals whose every token chooses for itself, in every layer, what of the far text it attends to.

A layer's attention over the sink and the tokens that follow is that of the model; attention over each token's own
choice is computed apart, with each token as a row of the batch, and the two are joined by their log-sum-exp into one
softmax over both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_kernels import context_attention
from mc_runtime.model.layers import Attention
from mc_runtime.model.stores import ConcatStore

from ..pasts import Past, attention_of, layer_queries


@dataclass(frozen=True)
class Choice:
    """What each token sees of the far text in one layer.

    index: [B, T, H, S] places of far tokens, with H 1 (all heads see the same), Hkv or Hq. position: [B, T, S], where
    they stand for that token; -1: empty.
    """

    index: Tensor
    position: Tensor


class PerQueryRival(ABC):
    name: str
    ours, anew = False, True

    @abstractmethod
    def choose(self, past: Past, layer: int, queries: Tensor, at: Tensor, slots: int, packed: bool) -> Choice | None:
        """queries: [B, Hq, T, D], unrotated, of the tokens that stand at `at [T]`; the choice of token t may depend on
        no later ones (the recent tokens, all known, may depend on each other). None: nothing is seen in this layer."""

    def start(self, past: Past, slots: int, packed: bool) -> int:
        """Position of the first token that follows."""
        return 1 + min(slots, past.far - 1) if packed else past.far

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        follow, decoder = past.follow, past.decoder
        start = self.start(past, slots, packed)
        at = torch.arange(start, start + follow.shape[1], device=follow.device)
        sink = torch.zeros(past.batch, 1, dtype=torch.int64, device=follow.device)
        store = _LastStore(past.k[:, :, :, :1], past.v[:, :, :, :1], sink)

        def add_choice(module: Attention, arguments: tuple[Any, ...], _: object) -> tuple[Tensor, None] | None:
            queries = layer_queries(module, arguments[0])
            choice = self.choose(past, module.layer, queries, at, slots, packed)
            if choice is None:
                return None
            out = attend(past, module.layer, queries, at, choice, store.last)
            return module.out(out.transpose(1, 2).flatten(2)), None

        layers = range(decoder.config.n_layers)
        hooks = [attention_of(decoder, layer).register_forward_hook(add_choice) for layer in layers]
        try:
            return decoder(decoder.embed(follow), at.expand(follow.shape), store).hidden
        finally:
            for hook in hooks:
                hook.remove()


class _LastStore(ConcatStore):
    """Remembers what it gave to the layer that asked last."""

    last: tuple[Tensor, Tensor, Tensor]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.last = super().update(layer, k, v)
        return self.last


def attend(
    past: Past, layer: int, queries: Tensor, at: Tensor, choice: Choice, near: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """One softmax over `near` (keys, values [B, Hkv, S, D] and positions [B, S]) and each token's choice of the far
    tokens. queries: [B, Hq, T, D] at positions `at [T]` -> [B, Hq, T, D]."""
    rope = past.decoder.rope
    batch, _, length, _ = queries.shape
    keys, values, kv_pos = near
    here, here_lse = context_attention(queries, keys, values, at.expand(batch, -1), kv_pos, rope, return_lse=True)
    rows = queries.transpose(1, 2).flatten(0, 1)[:, :, None]  # [B*T, Hq, 1, D]
    there, there_lse = context_attention(
        rows,
        _chosen(past.k[layer], choice.index),
        _chosen(past.v[layer], choice.index),
        at.repeat(batch)[:, None],
        choice.position.flatten(0, 1),
        rope,
        return_lse=True,
    )
    there = there[:, :, 0].unflatten(0, (batch, length)).transpose(1, 2)
    there_lse = there_lse[:, :, 0].unflatten(0, (batch, length)).transpose(1, 2)
    # The share of the choice in the joint softmax.
    share = torch.sigmoid(there_lse - here_lse)[..., None]
    return ((1 - share) * here.float() + share * there.float()).to(queries)


def _chosen(far: Tensor, index: Tensor) -> Tensor:
    """far [B, Hkv, N, D], index [B, T, H, S] -> [B*T, max(H, Hkv), S, D]."""
    heads = max(far.shape[1], index.shape[2])
    source = far.repeat_interleave(heads // far.shape[1], 1)[:, None].expand(-1, index.shape[1], -1, -1, -1)
    where = index.expand(-1, -1, heads, -1)[..., None].expand(-1, -1, -1, -1, far.shape[-1])
    return source.gather(3, where).flatten(0, 1)
