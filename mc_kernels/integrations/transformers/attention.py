"""The attention function of attached models, registered with transformers as `megacontext`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from ...context_attention import context_attention
from ...rope import RopeSpec, apply_rope
from .positioned import PositionedCache

NAME = "megacontext"


class Running:
    """What the attention layers of one attached model share: the cache of the forward that is under way."""

    def __init__(self) -> None:
        self.cache: PositionedCache | None = None


@dataclass(frozen=True)
class AttentionLayer:
    """rope: how the layer rotates queries and keys, None for a layer without positions.
    window: it sees the newest so many positions, its own included; None: all."""

    rope: RopeSpec | None
    window: int | None
    running: Running


@dataclass(frozen=True)
class Call:
    """What a layer gave to its attention function: q [B, Hq, T, D], k, v [B, Hkv, T, D], the rest by name."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]


# Which layer of which attached model an attention module is.
LAYERS: WeakKeyDictionary[nn.Module, AttentionLayer] = WeakKeyDictionary()


class _Recorder:
    """While `calls` is a list, layers are recorded and attend to nothing."""

    def __init__(self) -> None:
        self.calls: list[Call] | None = None


RECORDER = _Recorder()


def megacontext_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over its cache.

    query [B, Hq, T, D], unrotated; key, value [B, Hkv, S, D], what the cache's layer returned. Gives [B, T, Hq, D] and
    no attention weights. Raises RuntimeError for a layer of a model that is not attached, ValueError for dropout and
    for attention weights.
    """
    if RECORDER.calls is not None:
        RECORDER.calls.append(Call(module, query, key, value, {"scaling": scaling, **options}))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None
    layer = LAYERS.get(module)
    if layer is None or layer.running.cache is None:
        raise RuntimeError(
            f"attention {NAME!r}: {type(module).__name__} runs in no forward of an attached model; call attach(model) "
            "(a copy of an attached model is not attached) and run the model itself, not its layers"
        )
    if dropout:
        raise ValueError(f"dropout: expected 0 in attention over a Working Context, got {dropout}; call model.eval()")
    if options.get("output_attentions"):
        raise ValueError("output_attentions: expected False, attention weights are never in memory; got True")
    cache = layer.running.cache
    kv_pos = cache.kv_pos
    if layer.window is not None and cache.reach > layer.window:
        if query.shape[2] > 1:
            return _windowed(query, key, value, layer.rope, layer.window, cache, scaling).transpose(1, 2), None
        kv_pos = kv_pos.masked_fill(kv_pos <= cache.q_pos - layer.window, -1)
    result: Any = context_attention(
        query, key, value, cache.q_pos, kv_pos, layer.rope,
        sigma=cache.sigma if layer.rope is not None else None,
        kv_bias=cache.kv_bias, scale=scaling, return_mass=cache.masses is not None,
    )  # fmt: skip
    if cache.masses is None:
        return result.transpose(1, 2), None
    cache.masses.append(result[1])
    return result[0].transpose(1, 2), None


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, rope: RopeSpec | None, window: int, cache: PositionedCache, scaling: float | None
) -> Tensor:
    """Several queries under a sliding window that is shorter than the context: which slots a query sees is no longer
    a matter of one bound, so the mask is written out and torch attends."""
    if cache.masses is not None or cache.sigma is not None:
        raise ValueError("cache: expected no mass and no sigma under a sliding window that is shorter than the context")
    q_pos, kv_pos = cache.q_pos[:, :, None], cache.kv_pos[:, None, :]
    visible = (kv_pos >= 0) & (kv_pos <= q_pos) & (kv_pos > q_pos - window)  # [B, T, S]
    if rope is not None:
        q, k = apply_rope(q, cache.q_pos[:, None], rope), apply_rope(k, cache.kv_pos[:, None], rope)
    bias = torch.zeros_like(visible, dtype=q.dtype)
    if cache.kv_bias is not None:
        bias = bias + cache.kv_bias[:, None].to(q.dtype)
    mask = bias.masked_fill(~visible, float("-inf"))[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    return out.masked_fill(~visible.any(-1)[:, None, :, None], 0.0)  # padding sees nothing


AttentionInterface.register(NAME, megacontext_attention)
