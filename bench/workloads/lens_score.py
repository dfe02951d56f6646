"""`lens_score`: gain and cost of every entry of a Working Context. Checked whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import lens_score
from mc_kernels.lens_score.weights import LensScoreWeights

from .base import Check, Workload, error_rule

Args = tuple[Tensor, Tensor, Tensor, LensScoreWeights, Tensor]
EPS = 1e-12


def plain_score(entries: Tensor, features: Tensor, queries: Tensor, weights: LensScoreWeights, legal: Tensor) -> Tensor:
    """The net as model code writes it: every entry is projected to keys, values and queries, torch's fused attention,
    the storage dtype throughout."""
    w = weights
    heads, e, n_queries = w.n_heads, entries.shape[1], queries.shape[0]
    width = w.w_in.shape[0]

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(0, 1)

    x = F.rms_norm(entries, (e,), eps=EPS)
    z = F.linear(F.rms_norm(queries, (e,), eps=EPS), w.w_in)
    for i in range(w.read_q.shape[0]):
        q = split(F.linear(F.rms_norm(z, (width,), w.read_norm[i], EPS), w.read_q[i]))
        k, v = split(F.linear(x, w.read_k[i])), split(F.linear(x, w.read_v[i]))
        read = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        z = z + F.linear(read.transpose(0, 1).flatten(1), w.read_out[i])
        gate, up = F.linear(F.rms_norm(z, (width,), w.mlp_norm[i], EPS), w.mlp_gate_up[i]).chunk(2, dim=-1)
        z = z + F.linear(F.silu(gate) * up, w.mlp_down[i])
    s = F.rms_norm(z, (width,), w.score_norm, EPS)
    logits = split(F.linear(x, w.score_q)) @ split(F.linear(s, w.score_k)).transpose(-1, -2)
    logits = logits * (width // heads) ** -0.5  # [H, N, Q]
    attended = torch.softmax(logits, dim=-1) @ split(F.linear(s, w.score_v))
    match = torch.logsumexp(logits, dim=-1) - math.log(n_queries)
    direct = F.linear(x, w.direct)
    inputs = torch.cat((attended.transpose(0, 1).flatten(1), match.T, direct, features.to(entries.dtype)), dim=-1)
    scores = F.linear(F.silu(F.linear(inputs, w.head_in, w.head_bias)), w.head_out, w.head_out_bias)
    return torch.where(legal, scores, 0.0).float()


class LensScore(Workload):
    op = "lens_score"

    @property
    def rows(self) -> int:
        return int(self.case.entries)

    def ours(self, inputs: Args, backend: str) -> Tensor:
        entries, features, queries, weights, legal = inputs
        return lens_score(entries, features, queries, weights, legal=legal, backend=backend)

    def plain(self, inputs: Args) -> Tensor:
        return plain_score(*inputs)

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        entries, features, queries, weights, legal = inputs
        exact = lens_score(
            entries.double(), features.double(), queries.double(), weights.to(dtype=torch.float64), legal=legal,
            backend="ref",
        )  # fmt: skip
        plain = plain_score(*inputs)
        return lambda out: error_rule([out], [exact], [plain])
