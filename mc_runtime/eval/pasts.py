"""A held-out past: what every rival may look at when it fills its slots."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mc_kernels.rope import apply_rope
from mc_runtime.errors import InputError
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.layers import Attention, Layer
from mc_runtime.model.stores import ConcatStore
from mc_runtime.train.corpus import Corpus

# Targets start at least so many tokens into a text that is long enough: settings with less past share them.
REACH = 4096


def draw_windows(corpus: Corpus, n: int, past: int, targets: int, seed: int) -> Tensor:
    """n windows of `past` tokens and the `targets` that follow them, [n, past + targets] int64, spread over the text.

    One window starts in each n-th of the text. Where targets start depends on the text, n, targets and seed alone, as
    long as `past` is at most REACH and the text longer than that by half. Raises InputError if the text is too short.
    """
    total = len(corpus.ids)
    first = REACH if past <= REACH and total >= 1.5 * REACH + targets else past
    places = total - targets - first + 1
    if places < 1:
        raise InputError(f"{corpus.name}: expected a text of at least {past + targets} tokens, got {total}")
    rng = random.Random(f"{seed} {corpus.name} {n}")
    starts = [first + int((i + rng.random()) * places / n) for i in range(n)]
    return torch.from_numpy(np.stack([corpus.ids[s - past : s + targets].astype(np.int64) for s in starts]))


def layer_queries(attention: Attention, x: Tensor) -> Tensor:
    """What a layer asks with: x [B, T, E], the layer's normed input -> [B, Hq, T, D], unrotated."""
    rows = attention.qkv(x).unflatten(-1, (-1, attention.head_dim))[:, :, : attention.n_heads].transpose(1, 2)
    return rows if attention.q_norm is None else attention.q_norm(rows)


def attention_of(decoder: Decoder, layer: int) -> Attention:
    return cast(Layer, decoder.layers[layer]).attention


@dataclass(frozen=True)
class Past:
    """B windows of text: `far` tokens that have to be kept in few slots, then `recent` ones that all see, then targets.

    ids: [B, far + recent + targets]. k, v: [L, B, Hkv, far + recent, D] in full context, keys unrotated. inputs: [L, B,
    far + recent, E], what each layer's attention reads. hidden: [B, recent + targets, E], the final hidden states of
    what follows the far tokens, in full context.
    """

    decoder: Decoder
    ids: Tensor
    far: int
    recent: int
    k_all: Tensor
    v_all: Tensor
    inputs: Tensor
    hidden: Tensor

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def k(self) -> Tensor:
        """[L, B, Hkv, far, D], unrotated."""
        return self.k_all[:, :, :, : self.far]

    @property
    def v(self) -> Tensor:
        """[L, B, Hkv, far, D]"""
        return self.v_all[:, :, :, : self.far]

    @property
    def follow(self) -> Tensor:
        """ids [B, recent + targets]."""
        return self.ids[:, self.far :]

    @cached_property
    def attention_mass(self) -> Tensor:
        """Probability that the recent tokens give each far token in full context, summed over the recent tokens and
        the query heads of a group, [L, B, Hkv, far] fp32."""
        n, far = self.far + self.recent, self.far
        at = torch.arange(n, device=self.ids.device)
        hidden_from = at[None, :] > at[far:, None]
        out = []
        for layer, (k, x) in enumerate(zip(self.k_all, self.inputs, strict=True)):
            q = layer_queries(attention_of(self.decoder, layer), x[:, far:])
            keys = apply_rope(k.float(), at, self.decoder.rope)
            queries = apply_rope(q.float(), at[far:], self.decoder.rope).unflatten(1, (k.shape[1], -1))
            logits = torch.einsum("bhgtd,bhsd->bhgts", queries, keys) * k.shape[-1] ** -0.5
            mass = torch.softmax(logits.masked_fill(hidden_from, float("-inf")), dim=-1)
            out.append(mass[..., :far].sum(dim=(2, 3)))
        return torch.stack(out)

    def received(self, span: int) -> Tensor:
        """Mean logit that each far token gets from the `span` tokens after it (as many as are known), in full context,
        averaged over the query heads of a group, [L, B, Hkv, far] fp32."""
        n = self.far + self.recent
        at = torch.arange(n, device=self.ids.device)
        stop = (at[: self.far] + span).clamp(max=n - 1)
        out = []
        for layer, (k, x) in enumerate(zip(self.k_all, self.inputs, strict=True)):
            q = apply_rope(layer_queries(attention_of(self.decoder, layer), x).float(), at, self.decoder.rope)
            sums = q.unflatten(1, (k.shape[1], -1)).mean(2).double().cumsum(2)
            asked = (sums[:, :, stop] - sums[:, :, : self.far]) / (stop - at[: self.far])[:, None]
            keys = apply_rope(k[:, :, : self.far].float(), at[: self.far], self.decoder.rope)
            out.append((asked.float() * keys).sum(-1) * k.shape[-1] ** -0.5)
        return torch.stack(out)


@torch.no_grad()
def read_past(decoder: Decoder, ids: Tensor, far: int, recent: int) -> Past:
    """Run the windows in full context. ids: [B, N]; at least one recent token."""
    store = ConcatStore()
    known = far + recent
    inputs: list[Tensor] = []

    def keep(_module: object, arguments: tuple[Tensor, ...]) -> None:
        inputs.append(arguments[0][:, :known])

    layers = range(decoder.config.n_layers)
    hooks = [attention_of(decoder, layer).register_forward_pre_hook(keep) for layer in layers]
    try:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = decoder(decoder.embed(ids), positions, store).hidden
    finally:
        for hook in hooks:
            hook.remove()
    k, v = store.keys[:, :, :, :known], store.values[:, :, :, :known]
    return Past(decoder, ids, far, recent, k, v, torch.stack(inputs), hidden[:, far:])


@dataclass(frozen=True)
class Kept:
    """What a rival puts into its slots, behind the sink token and before the recent tokens, in timeline order.

    k, v: [L, B, Hkv, S, D], keys unrotated; heads may keep different tokens. position: [B, S] for true positions (used
    where positions are not packed). bias: log-weight of these entries in attention.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    bias: float = 0.0


def hidden_after(past: Past, kept: Kept | None, *, packed: bool = True) -> Tensor:
    """Hidden states [B, recent + targets, E] of what follows the past, when the past is the first token and `kept`.

    packed: entries stand at their rank, as in a Working Context; else where they stood in the text.
    """
    ids, k, v = past.ids, past.k[:, :, :, :1], past.v[:, :, :, :1]
    position = torch.zeros(past.batch, 1, dtype=torch.int64, device=ids.device)
    bias = None
    if kept is not None:
        k, v = torch.cat((k, kept.k.to(k)), 3), torch.cat((v, kept.v.to(v)), 3)
        position = torch.cat((position, kept.position), 1)
        if kept.bias:
            bias = torch.full(position.shape, kept.bias, device=ids.device)
            bias[:, 0] = 0.0  # the sink
    slots = k.shape[3]
    if packed:
        position = torch.arange(slots, device=ids.device).expand(past.batch, slots)
    follow = past.follow
    start = slots if packed else past.far
    at = torch.arange(start, start + follow.shape[1], device=ids.device).expand(follow.shape)
    return past.decoder(past.decoder.embed(follow), at, ConcatStore(k, v, position, kv_bias=bias)).hidden


def hidden_behind(
    past: Past, rows: Tensor, position: Tensor, *, packed: bool = True, follow: Tensor | None = None
) -> Tensor:
    """Hidden states [B, T, E] of `follow [B, T]` (all that follows the far tokens) behind the first token and entries
    that are run through the model again: rows [B, S, E] in embedding space, position [B, S] as in `Kept`."""
    decoder = past.decoder
    follow = past.follow if follow is None else follow
    x = torch.cat((decoder.embed(past.ids[:, :1]), rows.to(decoder.dtype), decoder.embed(follow)), dim=1)
    at = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    if not packed:
        tail = torch.arange(past.far, past.far + follow.shape[1], device=x.device).expand(follow.shape)
        at = torch.cat((position.new_zeros(past.batch, 1), position, tail), dim=1)
    return decoder(x, at).hidden[:, -follow.shape[1] :]


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [L, B, Hkv, N, D] at entries index [L, B, Hkv, S] -> [L, B, Hkv, S, D]."""
    return x.gather(3, index[..., None].expand(*index.shape, x.shape[-1]))
