"""`gist_encode`: N windows of K embeddings through a small transformer. Checked on up to 8 of the windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import gist_encode
from mc_kernels.gist_encode.weights import GistEncodeWeights
from mc_kernels.rope import phases, rotate

from .base import Check, Workload, error_rule

Args = tuple[Tensor, GistEncodeWeights]
CHECKED_BLOCKS = 8
EPS = 1e-12


def plain_encode(blocks: Tensor, weights: GistEncodeWeights) -> Tensor:
    """The net as model code: torch's linear, RMS norm and fused attention in the storage dtype; softmax pooling."""
    w = weights
    (n, k, e), width, heads = blocks.shape, w.width, w.n_heads
    head_dim = width // heads
    inv_freq = w.rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=blocks.device) / head_dim)
    cos, sin = (x.to(blocks.dtype) for x in phases(torch.arange(k, device=blocks.device), inv_freq))
    h = F.linear(F.rms_norm(blocks, (e,), eps=EPS), w.w_in) + w.level_emb[0]
    for i in range(w.qkv.shape[0]):
        qkv = F.linear(F.rms_norm(h, (width,), w.attn_norm[i], EPS), w.qkv[i])
        q, key, v = qkv.view(n, k, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin, False), rotate(key, cos, sin, False), v)
        h = h + F.linear(attended.transpose(1, 2).reshape(n, k, width), w.attn_out[i])
        gate, up = F.linear(F.rms_norm(h, (width,), w.ffn_norm[i], EPS), w.gate_up[i]).chunk(2, dim=-1)
        h = h + F.linear(F.silu(gate) * up, w.down[i])
    s = F.rms_norm(h, (width,), w.final_norm, EPS)
    p = torch.softmax(w.pool_q @ s.transpose(-1, -2) * width**-0.5, dim=-1)
    base = F.rms_norm(blocks.mean(1, keepdim=True) - w.mu, (e,), eps=EPS) * w.target_rms
    z = base + F.linear(p @ s, w.w_out)
    return F.rms_norm(z, (e,), eps=EPS) * (w.gain * w.target_rms)


class GistEncode(Workload):
    op = "gist_encode"

    @property
    def rows(self) -> int:
        return self.case.blocks * self.case.block_size

    def ours(self, inputs: Args, backend: str) -> Tensor:
        return gist_encode(*inputs, backend=backend)

    def plain(self, inputs: Args) -> Tensor:
        return plain_encode(*inputs)

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        blocks, weights = inputs
        n = min(blocks.shape[0], CHECKED_BLOCKS)
        exact = gist_encode(blocks[-n:].double(), weights.to(dtype=torch.float64), backend="ref")
        plain = plain_encode(blocks[-n:], weights)
        return lambda out: error_rule([out[-n:]], [exact], [plain])
