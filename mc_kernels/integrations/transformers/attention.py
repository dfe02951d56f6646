"""The attention function of attached models, registered with transformers as `megacontext`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ...context_attention import context_attention
from ...rope import RopeSpec
from .explicit import explicit_attention
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
        raise ValueError("output_attentions: expected False, attention weights are not given; got True")
    cache = layer.running.cache
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    window = layer.window if layer.window is not None and cache.reach > layer.window else None
    if (
        softcap is not None
        or (window is not None and query.shape[2] > 1)
        or (sinks is not None and cache.masses is not None)
    ):
        out, mass = explicit_attention(
            query, key, value, layer.rope, cache, window=window, scale=scaling, softcap=softcap, sinks=sinks
        )
        return _booked(out, mass, cache)
    kv_pos = cache.kv_pos
    if window is not None:
        kv_pos = kv_pos.masked_fill(kv_pos <= cache.q_pos - window, -1)
    result: Any = context_attention(
        query, key, value, cache.q_pos, kv_pos, layer.rope,
        sigma=cache.sigma if layer.rope is not None else None,
        kv_bias=cache.kv_bias, scale=scaling, return_lse=sinks is not None, return_mass=cache.masses is not None,
    )  # fmt: skip
    if sinks is not None:
        # The sink's share of the softmax goes to no value.
        kept = torch.sigmoid(result[1] - sinks.float()[:, None])[..., None]
        return _booked((result[0] * kept).to(query.dtype), None, cache)
    out, mass = (result, None) if cache.masses is None else result
    return _booked(out, mass, cache)


def _booked(out: Tensor, mass: Tensor | None, cache: PositionedCache) -> tuple[Tensor, None]:
    if mass is not None and cache.masses is not None:
        cache.masses.append(mass)
    return out.transpose(1, 2), None


AttentionInterface.register(NAME, megacontext_attention)
