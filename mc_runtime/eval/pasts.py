"""A held-out past: what every rival may look at when it fills its slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mc_runtime.model.decoder import Decoder, Layer
from mc_runtime.model.stores import ConcatStore


@dataclass(frozen=True)
class Past:
    """B windows of text: `far` tokens that have to be kept in few slots, then `recent` ones that all see, then targets.

    ids: [B, far + recent + targets]. k, v: [L, B, Hkv, far, D] of the far tokens in their full context, keys unrotated.
    queries: [L, B, Hq, recent, D] of the recent tokens in their full context, unrotated. hidden: [B, far + recent +
    targets, E], the final hidden states in full context.
    """

    decoder: Decoder
    ids: Tensor
    far: int
    recent: int
    k: Tensor
    v: Tensor
    queries: Tensor
    hidden: Tensor

    @property
    def batch(self) -> int:
        return self.ids.shape[0]


@torch.no_grad()
def read_past(decoder: Decoder, ids: Tensor, far: int, recent: int) -> Past:
    """Run the windows in full context. ids: [B, N]."""
    store = ConcatStore()
    inputs: list[Tensor] = []

    def keep(_module: object, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0][:, far : far + recent])

    layers = [cast(Layer, layer) for layer in decoder.layers]
    hooks = [layer.attention.register_forward_pre_hook(keep) for layer in layers]
    try:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = decoder(decoder.embed(ids), positions, store).hidden
    finally:
        for hook in hooks:
            hook.remove()
    c = decoder.config
    queries = []
    for layer, x in zip(layers, inputs, strict=True):
        rows = layer.attention.qkv(x).unflatten(-1, (-1, c.head_dim))[:, :, : c.n_heads].transpose(1, 2)
        norm = layer.attention.q_norm
        queries.append(rows if norm is None else norm(rows))
    return Past(
        decoder, ids, far, recent, store.keys[:, :, :, :far], store.values[:, :, :, :far], torch.stack(queries), hidden
    )


@dataclass(frozen=True)
class Kept:
    """What a rival puts into its slots, behind the sink token and before the recent tokens, in timeline order.

    k, v: [L, B, Hkv, S, D], keys unrotated; heads may keep different tokens. position: [B, S] for true positions (used
    where positions are not packed).
    """

    k: Tensor
    v: Tensor
    position: Tensor


@torch.no_grad()
def hidden_after(past: Past, kept: Kept | None, *, packed: bool = True, sink: bool = True) -> Tensor:
    """Hidden states [B, recent + targets, E] of what follows the past, when the past is the first token and `kept`.

    packed: entries stand at their rank, as in a Working Context; else where they stood in the text.
    """
    c, ids = past.decoder.config, past.ids
    shape = (c.n_layers, past.batch, c.n_kv_heads, 0, c.head_dim)
    ks: list[Tensor] = [past.k[:, :, :, :1]] if sink else [past.k.new_zeros(shape)]
    vs: list[Tensor] = [past.v[:, :, :, :1]] if sink else [past.v.new_zeros(shape)]
    true = [torch.zeros(past.batch, int(sink), dtype=torch.int64, device=ids.device)]
    if kept is not None:
        ks.append(kept.k.to(past.k))
        vs.append(kept.v.to(past.v))
        true.append(kept.position)
    k, v, position = torch.cat(ks, 3), torch.cat(vs, 3), torch.cat(true, 1)
    slots = k.shape[3]
    if packed:
        position = torch.arange(slots, device=ids.device).expand(past.batch, slots)
    follow = ids[:, past.far :]
    start = slots if packed else past.far
    at = torch.arange(start, start + follow.shape[1], device=ids.device).expand(follow.shape)
    store = ConcatStore(k, v, position) if slots else ConcatStore()
    return past.decoder(past.decoder.embed(follow), at, store).hidden


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [L, B, Hkv, N, D] at entries index [L, B, Hkv, S] -> [L, B, Hkv, S, D]."""
    return x.gather(3, index[..., None].expand(*index.shape, x.shape[-1]))
