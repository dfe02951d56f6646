"""Oracle of `context_attention`: attention over a slot cache with RoPE applied to the keys while they are read.

    logits[b,h,t,s] = scale * <R(q_pos[b,t]) q[b,h,t], damp(sigma[b,s]) R(kv_pos[b,s]) k[b,h/g,s]> + kv_bias[b,s]
    visible[b,t,s]  = 0 <= kv_pos[b,s] <= q_pos[b,t]
    p = softmax over visible s;  out = p v;  lse = logsumexp of visible logits;  mass[b,s] = sum over h and t of p

q [B,Hq,T,D]; k, v [B,Hkv,S,D], unrotated keys; g = Hq/Hkv. Accumulates in fp32 (fp64 for fp64 input). A query that
sees nothing gives out = 0 and lse = -inf. Empty B, T or S give empty or zero outputs. Of an fp8 cache, k and v stand
for k k_scale[h] and v v_scale[h] in fp32.
Damping (Gaussian RoPE: the expectation of the rotation over positions spread by `sigma`): band b of a key shrinks by
exp(-(inv_freq[b] sigma)^2 / 2), which is exactly 1 at sigma = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from ..registry import register
from ..rope import phases, rotate

# Scores are computed for this many (query, key) pairs at a time, so that they stay in a CPU's cache.
TILE_PAIRS = 1 << 20


def _rotated_queries(q: Tensor, q_pos: Tensor, inv_freq: Tensor | None, interleaved: bool, scaling: float) -> Tensor:
    acc = accumulate_dtype(q.dtype)
    if inv_freq is None:
        return q.to(acc)
    cos, sin = phases(q_pos, inv_freq, acc)
    return rotate(q, cos[:, None], sin[:, None], interleaved) * scaling


def _rotated_keys(
    k: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool, scaling: float, sigma: Tensor | None
) -> Tensor:
    acc = accumulate_dtype(k.dtype)
    if inv_freq is None:
        return k.to(acc)
    cos, sin = phases(kv_pos, inv_freq, acc)
    if sigma is not None:
        damp = torch.exp(-0.5 * (sigma.to(acc)[..., None] * inv_freq.to(acc)) ** 2)
        cos, sin = cos * damp, sin * damp
    return rotate(k, cos[:, None], sin[:, None], interleaved) * scaling


def _tiles(q: Tensor, s: int) -> list[tuple[int, int]]:
    b, hq, t, _ = q.shape
    step = max(1, TILE_PAIRS // max(1, b * hq * s))
    return [(i, min(i + step, t)) for i in range(0, t, step)]


def _visible(q_pos: Tensor, kv_pos: Tensor) -> Tensor:
    return (kv_pos >= 0)[:, None, :] & (kv_pos[:, None, :] <= q_pos[:, :, None])  # [B,T,S]


def _probabilities(q: Tensor, kt: Tensor, visible: Tensor, kv_bias: Tensor | None, scale: float) -> tuple[Tensor, ...]:
    """q [B,Hkv,g,t,D] rotated, kt [B,Hkv,D,S] rotated, visible [B,t,S] -> p [B,Hkv,g,t,S], lse [B,Hkv,g,t]."""
    b, hkv, g, t, d = q.shape
    logits = (q.reshape(b, hkv, g * t, d) @ kt).view(b, hkv, g, t, -1).mul_(scale)
    if kv_bias is not None:
        logits += kv_bias.to(logits.dtype)[:, None, None, None, :]
    logits.masked_fill_(~visible[:, None, None], float("-inf"))
    # Not by lse, whose last bit is large where logits are: probabilities sum to 1.
    top = logits.amax(-1, keepdim=True)
    top.masked_fill_(top == float("-inf"), 0.0)
    p = logits.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    lse = (total.log() + top).squeeze(-1)
    return p.div_(total.masked_fill_(total == 0.0, 1.0)), lse


@register("context_attention", "ref")
def context_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    kv_pos: Tensor,
    inv_freq: Tensor | None,
    interleaved: bool,
    attention_scaling: float,
    sigma: Tensor | None,
    kv_bias: Tensor | None,
    scale: float,
    return_mass: bool,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [B,Hq,T,D] in q's dtype, lse [B,Hq,T] and mass [B,S] ([0] unless asked) in the accumulate dtype."""
    (b, hq, t, d), (hkv, s) = q.shape, k.shape[1:3]
    acc = accumulate_dtype(q.dtype)
    out = q.new_zeros(b, hq, t, d)
    lse = torch.full((b, hq, t), float("-inf"), dtype=acc, device=q.device)
    mass = torch.zeros((b, s) if return_mass else (0,), dtype=acc, device=q.device)
    if out.numel() == 0 or s == 0:
        return out, lse, mass
    if k_scale is not None and v_scale is not None:
        k, v = (x.to(acc) * by_head.to(acc)[:, None, None] for x, by_head in ((k, k_scale), (v, v_scale)))
    g = hq // hkv
    kt = _rotated_keys(k, kv_pos, inv_freq, interleaved, attention_scaling, sigma).transpose(-1, -2)
    values = v.to(acc)
    for i, j in _tiles(q, s):
        rotated = _rotated_queries(q[:, :, i:j], q_pos[:, i:j], inv_freq, interleaved, attention_scaling)
        p, lse_tile = _probabilities(
            rotated.view(b, hkv, g, j - i, d), kt, _visible(q_pos[:, i:j], kv_pos), kv_bias, scale
        )
        out[:, :, i:j] = (p.view(b, hkv, g * (j - i), s) @ values).view(b, hq, j - i, d)
        lse[:, :, i:j] = lse_tile.view(b, hq, j - i)
        if return_mass:
            mass += p.sum(dim=(1, 2, 3))
    return out, lse, mass


@register("context_attention_backward", "ref")
def context_attention_backward_ref(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    kv_pos: Tensor,
    inv_freq: Tensor | None,
    interleaved: bool,
    attention_scaling: float,
    sigma: Tensor | None,
    kv_bias: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `out` with respect to q, k, v and kv_bias ([0] where there is none), by the softmax's closed form:
    dS = P * (dO V^T - rowsum(dO * O))."""
    (b, hq, t, d), (hkv, s) = q.shape, k.shape[1:3]
    acc = accumulate_dtype(q.dtype)
    dq = torch.zeros(b, hq, t, d, dtype=acc, device=q.device)
    dk = torch.zeros(b, hkv, s, d, dtype=acc, device=q.device)
    dv, dbias = torch.zeros_like(dk), torch.zeros(b, s, dtype=acc, device=q.device)
    if q.numel() and s:
        g = hq // hkv
        keys = _rotated_keys(k, kv_pos, inv_freq, interleaved, attention_scaling, sigma)
        values = v.to(acc)
        for i, j in _tiles(q, s):
            n = g * (j - i)
            rotated = _rotated_queries(q[:, :, i:j], q_pos[:, i:j], inv_freq, interleaved, attention_scaling)
            qr = rotated.view(b, hkv, n, d)
            visible = _visible(q_pos[:, i:j], kv_pos)
            p, _ = _probabilities(qr.view(b, hkv, g, j - i, d), keys.transpose(-1, -2), visible, kv_bias, scale)
            p = p.view(b, hkv, n, s)
            do = grad_out[:, :, i:j].to(acc).reshape(b, hkv, n, d)
            delta = (grad_out[:, :, i:j].to(acc) * out[:, :, i:j].to(acc)).sum(-1).reshape(b, hkv, n, 1)
            ds = p * (do @ values.transpose(-1, -2) - delta)
            dv += p.transpose(-1, -2) @ do
            dq[:, :, i:j] = (ds @ keys).mul_(scale).view(b, hq, j - i, d)
            dk += (ds.transpose(-1, -2) @ qr).mul_(scale)
            dbias += ds.sum(dim=(1, 2))
        if inv_freq is not None:
            # The transpose of a rotation is the rotation back; damping and magnitude are diagonal.
            dq = _rotated_queries(dq, -q_pos, inv_freq, interleaved, attention_scaling)
            dk = _rotated_keys(dk, -kv_pos, inv_freq, interleaved, attention_scaling, sigma)
    bias = dbias.to(kv_bias.dtype) if kv_bias is not None else dbias.new_zeros(0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), bias
