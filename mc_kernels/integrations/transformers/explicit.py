"""Attention that `context_attention` does not do, written out in PyTorch: several queries under a sliding window that
is shorter than the context, and logits that are capped. All logits are in memory, [B, Hq, T, S]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...rope import RopeSpec, apply_rope
from .positioned import PositionedCache


def explicit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: RopeSpec | None,
    cache: PositionedCache,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """q [B, Hq, T, D], k, v [B, Hkv, S, D], unrotated; positions, weights and spreads are the cache's.

    window: a query sees the newest so many positions, its own included; None: all. softcap: logits are
    softcap * tanh(logits / softcap) before weights are added. sinks [Hq]: a logit beside those of the slots, without a
    value. Returns [B, Hq, T, D] (0 where a query sees nothing) and, where the cache asks for it, the mass [B, S].
    Raises ValueError for sigma.
    """
    if cache.sigma is not None:
        raise ValueError("cache: expected no sigma with capped logits, or a sliding window shorter than the context")
    q_pos, kv_pos = cache.q_pos[:, :, None], cache.kv_pos[:, None, :]
    visible = (kv_pos >= 0) & (kv_pos <= q_pos)  # [B, T, S]
    if window is not None:
        visible &= kv_pos > q_pos - window
    if rope is not None:
        q, k = apply_rope(q, cache.q_pos[:, None], rope), apply_rope(k, cache.kv_pos[:, None], rope)
    bias = torch.zeros_like(visible, dtype=q.dtype)
    if cache.kv_bias is not None:
        bias = bias + cache.kv_bias[:, None].to(q.dtype)
    bias = bias.masked_fill(~visible, float("-inf"))[:, None]
    blind = ~visible.any(-1)[:, None, :, None]  # padding sees nothing
    if softcap is None and sinks is None and cache.masses is None:
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=grouped)
        return out.masked_fill(blind, 0.0), None
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    if sinks is not None:
        logits = torch.cat((logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)), -1)
    p = logits.softmax(-1)[..., : k.shape[2]].masked_fill(blind, 0.0)
    return p.to(v.dtype) @ v, None if cache.masses is None else p.sum((1, 2))
