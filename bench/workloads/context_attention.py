"""`context_attention`: one layer of decoding (T = 1) or of a prefill chunk, keys rotated while they are read.

Checked on up to 16 of the queries, over all slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mc_kernels import context_attention
from mc_kernels.rope import RopeSpec, phases, rotate

from .base import Check, Workload, error_rule

Args = dict[str, Any]
CHECKED_QUERIES = 16


def rotate_as_stored(x: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """x [B, H, S, D] rotated at positions [B, S], phases and products in x's dtype, as model code does it."""
    cos, sin = phases(positions, rope.inv_freq_on(x.device))
    return rotate(x, cos[:, None].to(x.dtype), sin[:, None].to(x.dtype), rope.interleaved)


def visible(inputs: Args) -> Tensor | None:
    """[B, 1, T, S] mask, or None where every query sees every slot."""
    q_pos, kv_pos = inputs["q_pos"], inputs["kv_pos"]
    mask = (kv_pos >= 0)[:, None, None, :] & (kv_pos[:, None, None, :] <= q_pos[:, None, :, None])
    return None if bool(mask.all()) else mask


def plain_attention(inputs: Args) -> Tensor:
    """Rotate queries and keys, multiply, softmax, multiply: all in the storage dtype, the mask made on the way."""
    q = rotate_as_stored(inputs["q"], inputs["q_pos"], inputs["rope"])
    k = rotate_as_stored(inputs["k"], inputs["kv_pos"], inputs["rope"])
    (b, hq, t, d), hkv = q.shape, k.shape[1]
    logits = q.view(b, hkv, hq // hkv * t, d) @ k.transpose(-1, -2) * d**-0.5
    logits = logits.view(b, hq, t, -1)
    if t > 1:
        mask = inputs["kv_pos"][:, None, None, :] <= inputs["q_pos"][:, None, :, None]
        logits = logits.masked_fill(~mask, float("-inf"))
    p = torch.softmax(logits, dim=-1)
    return (p.view(b, hkv, hq // hkv * t, -1) @ inputs["v"]).view(b, hq, t, d)


def as_read(inputs: Args, dtype: torch.dtype) -> Args:
    """Inputs of q and of what keys and values stand for in `dtype`, without scales."""
    out = {name: x for name, x in inputs.items() if name not in ("k_scale", "v_scale")}
    for name in ("q", "k", "v"):
        scale = inputs.get(f"{name}_scale")
        wide = inputs[name] if scale is None else inputs[name].float() * scale[:, None, None]
        out[name] = wide.to(dtype)
    return out


class ContextAttention(Workload):
    op = "context_attention"

    @property
    def rivals(self) -> tuple[str, ...] | None:
        return ("torch",) if self.case.fp8 else None

    @property
    def rows(self) -> int:
        return self.case.heads // self.case.kv_heads * self.case.queries

    def ours(self, inputs: Args, backend: str) -> Any:
        return context_attention(**inputs, backend=backend)

    def plain(self, inputs: Args) -> Tensor:
        return plain_attention(as_read(inputs, self.dtype) if self.case.fp8 else inputs)

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        t = inputs["q"].shape[2]
        some = torch.linspace(0, t - 1, min(t, CHECKED_QUERIES), device=self.device).round().long()
        few = inputs | {"q": inputs["q"][:, :, some], "q_pos": inputs["q_pos"][:, some]}
        exact: Any = context_attention(**as_read(few, torch.float64), backend="ref")
        plain = self.plain(few)
        return lambda out: error_rule([out[:, :, some]], [exact], [plain])
