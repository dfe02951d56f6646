"""`gist_pool`: blocks of keys and values that lie in a cache are pooled, all layers in one call.

Checked on up to CHECKED_BLOCKS of the blocks: in fp64 all 256 of an 8B model took more than 9 GB.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mc_kernels import gist_pool
from mc_kernels.gist_pool.weights import GistPoolWeights

from .base import Check, Workload, error_rule

Args = tuple[Tensor, Tensor, GistPoolWeights]
CHECKED_BLOCKS = 32


def plain_pool(k: Tensor, v: Tensor, weights: GistPoolWeights) -> tuple[Tensor, Tensor]:
    """k, v [L, Hkv, N, K, D] (one sequence): concatenate, normalise, softmax, pool, linear residual."""
    w, b, m, c = weights.tensors()
    x = torch.cat((k, v), dim=-1)
    n = x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-12).to(x.dtype)
    p = torch.softmax(w[:, :, None] @ n.transpose(-1, -2) + b[:, :, None], dim=-1)
    y = p @ x
    out = y + y @ m[:, :, None] + c[:, :, None, None]
    k_gist, v_gist = out.chunk(2, dim=-1)
    return k_gist, v_gist


class GistPool(Workload):
    op = "gist_pool"

    def ours(self, inputs: Args, backend: str) -> tuple[Tensor, Tensor]:
        return gist_pool(*inputs, backend=backend)

    def plain(self, inputs: Args) -> tuple[Tensor, Tensor]:
        return plain_pool(*inputs)

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        k, v, weights = inputs
        n = min(k.shape[2], CHECKED_BLOCKS)
        k, v = k[:, :, -n:], v[:, :, -n:]
        exact = gist_pool(k.double(), v.double(), weights.to(dtype=torch.float64), backend="ref")
        plain = plain_pool(k, v, weights)
        return lambda out: error_rule([x[:, :, -n:] for x in out], exact, plain)
