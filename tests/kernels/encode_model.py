"""`gist_encode` written with torch.nn.functional, for its tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import GistEncodeWeights
from mc_kernels.gist_encode.cases import Case
from mc_kernels.gist_encode.weights import SHAPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unit(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()


def plain(case: Case, weights: GistEncodeWeights, blocks: Tensor, *tensors: Tensor) -> Tensor:
    """The net in the inputs' dtype, with complex rotation and torch's attention."""
    w = dict(zip(SHAPES, tensors, strict=True))
    n, heads, hd = blocks.shape[0], weights.n_heads, weights.width // weights.n_heads
    level = w["level_emb"][min(case.level, weights.n_levels) - 1]
    h = F.linear(unit(blocks), w["w_in"]) + level
    if case.pool == "cls":
        h = torch.cat((h, (w["pool_q"] + level).expand(n, 1, -1)), 1)
    t = h.shape[1]
    angle = torch.arange(t).double()[:, None] * weights.rope_theta ** (-torch.arange(0, hd, 2).double() / hd)

    def turn(x: Tensor) -> Tensor:
        pairs = torch.complex(*(y.double() for y in x.chunk(2, -1))) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat((pairs.real, pairs.imag), -1).to(x.dtype)

    for i in range(w["qkv"].shape[0]):
        parts = F.linear(unit(h) * w["attn_norm"][i], w["qkv"][i]).chunk(3, -1)
        q, k, v = (x.unflatten(-1, (heads, hd)).transpose(1, 2) for x in parts)
        a = F.scaled_dot_product_attention(turn(q), turn(k), v)
        h = h + F.linear(a.transpose(1, 2).flatten(2), w["attn_out"][i])
        gate, up = F.linear(unit(h) * w["ffn_norm"][i], w["gate_up"][i]).chunk(2, -1)
        h = h + F.linear(F.silu(gate) * up, w["down"][i])
    s = unit(h) * w["final_norm"]
    if case.pool == "softmax":
        s = torch.einsum("gd,njd->ngj", w["pool_q"], s).div(weights.width**0.5).softmax(-1) @ s
    elif case.pool == "mean":
        s = s.mean(1, keepdim=True)
    else:
        s = s[:, -1:]
    centred = blocks.mean(1, keepdim=True) - (w["mu"] if case.level == 1 else 0)
    return unit(unit(centred) * weights.target_rms + F.linear(s, w["w_out"])) * w["gain"] * weights.target_rms


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[GistEncodeWeights, tuple[Tensor, ...]]:
    blocks, weights = case.make(dtype, "cpu", seed)
    return weights, (blocks, *weights.tensors())
