"""Oracle of `gist_encode`: a small transformer that compresses a window of K embeddings into G gists.

With rms(x) = sqrt(mean(x^2) + RMS_EPS) over the last dimension, norm(x, g) = x / rms(x) * g:

    h_j = W_in (x_j / rms(x_j)) + level_emb[min(level, n_levels) - 1]                      [K, Eg]
    per layer:  a = norm(h, attn_norm); q, k, v = split(W_qkv a) into heads of width d = Eg / n_heads
                q, k rotated at positions 0..K-1 (local RoPE, halves paired); every j attends to every j, scale d^-1/2
                h += W_o attention;  h += W_down (silu(W_gate f) * W_up f) with f = norm(h, ffn_norm)
    s = norm(h, final_norm)
    pooled_g:   softmax: sum_j softmax_j(s_j . pool_q_g / sqrt(Eg)) s_j;   mean: mean_j s_j
                cls: pool_q_0 (plus the level embedding) runs along as entry K of the window; s of that entry
    centred = mean_j x_j - mu at level 1, mean_j x_j above (gists are centred already)
    base = centred / rms(centred) * target_rms
    z_g = base + W_out pooled_g;    gist_g = gain * target_rms * z_g / rms(z_g)

blocks [N,K,E] -> gists [N,G,E] in blocks' dtype; accumulates in fp32 (fp64 if blocks or weights are). N = 0 gives an
empty output. A centred mean of exactly zero gives base = 0, not NaN; RMS_EPS is there only for that.
Pre-norm transformer with RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), RoPE (Su et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulate_dtype
from ..library import differentiate
from ..registry import register
from ..rope import phases, rotate

RMS_EPS = 1e-12


def unit_rms(x: Tensor) -> Tensor:
    """x / rms(x) over the last dimension; 0 for a zero vector."""
    return x / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()


def _layer(
    h: Tensor, cos: Tensor, sin: Tensor, n_heads: int, norm1: Tensor, qkv: Tensor, out: Tensor,
    norm2: Tensor, gate_up: Tensor, down: Tensor,
) -> Tensor:  # fmt: skip
    n, t, width = h.shape
    q, k, v = ((unit_rms(h) * norm1) @ qkv.T).view(n, t, 3, n_heads, width // n_heads).permute(2, 0, 3, 1, 4)
    q, k = rotate(q, cos, sin, False), rotate(k, cos, sin, False)
    p = torch.softmax((q @ k.transpose(-1, -2)) * (width // n_heads) ** -0.5, dim=-1)
    h = h + (p @ v).transpose(1, 2).reshape(n, t, width) @ out.T
    gate, up = ((unit_rms(h) * norm2) @ gate_up.T).chunk(2, dim=-1)
    return h + (F.silu(gate) * up) @ down.T


def _encode(
    tensors: Sequence[Tensor], level: int, n_heads: int, pool: str, rope_theta: float, target_rms: float
) -> Tensor:
    (
        blocks, mu, w_in, level_emb, attn_norm, qkv, attn_out, ffn_norm, gate_up, down, final_norm, pool_q, w_out, gain,
    ) = tensors  # fmt: skip
    n, width = blocks.shape[0], w_in.shape[0]
    at_level = level_emb[min(level, level_emb.shape[0]) - 1]
    h = unit_rms(blocks) @ w_in.T + at_level
    if pool == "cls":
        h = torch.cat((h, (pool_q[0] + at_level).expand(n, 1, width)), dim=1)
    head_dim = width // n_heads
    inv_freq = rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=h.device) / head_dim)
    cos, sin = phases(torch.arange(h.shape[1], device=h.device), inv_freq, h.dtype)
    for i in range(qkv.shape[0]):
        h = _layer(h, cos, sin, n_heads, attn_norm[i], qkv[i], attn_out[i], ffn_norm[i], gate_up[i], down[i])
    s = unit_rms(h) * final_norm
    if pool == "softmax":
        pooled = torch.softmax((pool_q @ s.transpose(-1, -2)) * width**-0.5, dim=-1) @ s  # [N,G,Eg]
    else:
        pooled = s.mean(1, keepdim=True) if pool == "mean" else s[:, -1:]
    centred = blocks.mean(1, keepdim=True)
    if level == 1:
        centred = centred - mu
    z = unit_rms(centred) * target_rms + pooled @ w_out.T
    return unit_rms(z) * (gain * target_rms)


@register("gist_encode", "ref")
def gist_encode_ref(
    blocks: Tensor, mu: Tensor, w_in: Tensor, level_emb: Tensor, attn_norm: Tensor, qkv: Tensor, attn_out: Tensor,
    ffn_norm: Tensor, gate_up: Tensor, down: Tensor, final_norm: Tensor, pool_q: Tensor, w_out: Tensor, gain: Tensor,
    level: int, n_heads: int, pool: str, rope_theta: float, target_rms: float,
) -> Tensor:  # fmt: skip
    """Returns gists [N,G,E] in blocks' dtype."""
    if blocks.shape[0] == 0:
        return blocks.new_zeros(0, pool_q.shape[0], blocks.shape[2])
    tensors = (
        blocks, mu, w_in, level_emb, attn_norm, qkv, attn_out, ffn_norm, gate_up, down, final_norm, pool_q, w_out, gain
    )  # fmt: skip
    acc = torch.promote_types(accumulate_dtype(blocks.dtype), accumulate_dtype(w_in.dtype))
    return _encode([x.to(acc) for x in tensors], level, n_heads, pool, rope_theta, target_rms).to(blocks.dtype)


@register("gist_encode_backward", "ref")
def gist_encode_backward_ref(
    grad: Tensor, blocks: Tensor, mu: Tensor, w_in: Tensor, level_emb: Tensor, attn_norm: Tensor, qkv: Tensor,
    attn_out: Tensor, ffn_norm: Tensor, gate_up: Tensor, down: Tensor, final_norm: Tensor, pool_q: Tensor,
    w_out: Tensor, gain: Tensor, level: int, n_heads: int, pool: str, rope_theta: float, target_rms: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients for blocks and the 13 weights in their dtypes: recomputes the forward and differentiates it."""
    tensors = [
        blocks, mu, w_in, level_emb, attn_norm, qkv, attn_out, ffn_norm, gate_up, down, final_norm, pool_q, w_out, gain
    ]  # fmt: skip
    if blocks.shape[0] == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tensors)

    def forward(*inputs: Tensor) -> Tensor:
        return gist_encode_ref(*inputs, level, n_heads, pool, rope_theta, target_rms)

    return tuple(differentiate(forward, tensors, [grad]))
