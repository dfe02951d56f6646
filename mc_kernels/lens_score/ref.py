"""Oracle of `lens_score`: what each entry of the Working Context would gain expanded and cost collapsed.

With u(x) = x / rms(x), rms(x) = sqrt(mean(x^2) + RMS_EPS), norm(x, g) = u(x) * g, x_n = u(entry_n) (one scalar per
entry, taken in the stream that reads the entry), H heads of width d/H, W[h] the rows of head h:

    z_m = W_in u(query_m)                                                                   m < Q <= 16, [d]
    read pass i < P (the queries attend to all entries):
        A[h,m] = (d/H)^-1/2 read_k[h]^T (read_q norm(z_m, read_norm))[h]                    [E], key weights absorbed
        c[h,m] = sum_n softmax_n(A[h,m] . x_n) x_n                                          [E]
        z_m += read_out concat_h(read_v[h] c[h,m])                                          value weights absorbed
        z_m += mlp_down (silu(gate) * up),  gate, up = mlp_gate_up norm(z_m, mlp_norm)
    score pass (each entry attends to the queries), s_m = norm(z_m, score_norm):
        B[h,m] = (d/H)^-1/2 score_q[h]^T (score_k s_m)[h]                                   [E], query weights absorbed
        a[n,h,m] = x_n . B[h,m]
        values[n,h] = sum_m softmax_m(a[n,h,m]) (score_v s_m)[h]                            [dv]
        match[n,h] = logsumexp_m a[n,h,m] - log Q      how well the entry meets any query: the softmax forgets it
        f_n = [values, match, x_n . direct_j, features_n]
        scores_n = head_out silu(head_in f_n + head_bias) + head_out_bias                   (expand_gain, collapse_cost)
        scores_n = 0 exactly where not legal

So an entry is read once per read pass against H Q vectors and summed into H Q vectors, and read once more in the score
pass against H Q + J vectors; no N x E x d projection exists. Order of entries and of queries is immaterial.
Outputs are linear (no softplus or ReLU): an edit may measure better or worse than nothing, so nats of either sign.

entries [N,E], features [N,F], queries [Q,E], legal [N,2] bool or None -> [N,2] fp32 (fp64 if an input is).
Accumulates in that dtype. N = 0 gives an empty output.
Source: multi-head attention (Vaswani et al. 2017) with absorbed projections (DeepSeek-V2 2024, section 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import accumulate_dtype
from ..library import differentiate
from ..registry import register

RMS_EPS = 1e-12


def _inverse_rms(x: Tensor) -> Tensor:
    return 1.0 / (x.square().mean(-1, keepdim=True) + RMS_EPS).sqrt()


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * _inverse_rms(x) * gain


def _absorb(q: Tensor, weight: Tensor, n_heads: int) -> Tensor:
    """q [Q,d] and weight [d,E] -> the vectors [H,Q,E] whose inner products with x are the scaled logits."""
    head_dim = q.shape[1] // n_heads
    per_head = q.unflatten(1, (n_heads, head_dim)).transpose(0, 1)
    return per_head @ weight.unflatten(0, (n_heads, head_dim)) * head_dim**-0.5


class EntryStream:
    """The two ways in which the formula reads the entries; a backend may put its own in their place."""

    def __init__(self, entries: Tensor) -> None:
        self._entries, self._inverse = entries, _inverse_rms(entries)

    def products(self, vectors: Tensor) -> Tensor:
        """x_n . vectors_c: [N,C] of vectors [C,E]."""
        return (self._entries @ vectors.T) * self._inverse

    def sums(self, weights: Tensor) -> Tensor:
        """sum_n weights[n,c] x_n: [C,E] of weights [N,C]."""
        return (weights * self._inverse).T @ self._entries


def score_formula(
    tensors: Sequence[Tensor], legal: Tensor | None, n_heads: int, stream: EntryStream | None = None
) -> Tensor:
    """The formula in the dtype of `tensors` (entries, features, queries and the 18 weights) -> scores [N,2].

    stream: reads the entries instead of torch's products.
    """
    (
        entries, features, queries, w_in, read_norm, read_q, read_k, read_v, read_out, mlp_norm, mlp_gate_up, mlp_down,
        score_norm, score_q, score_k, score_v, direct, head_in, head_bias, head_out, head_out_bias,
    ) = tensors  # fmt: skip
    n, q, width = entries.shape[0], queries.shape[0], w_in.shape[0]
    stream = stream or EntryStream(entries)
    z = (queries * _inverse_rms(queries)) @ w_in.T
    for i in range(read_q.shape[0]):
        absorbed = _absorb(_norm(z, read_norm[i]) @ read_q[i].T, read_k[i], n_heads).flatten(0, 1)  # [H*Q,E]
        p = torch.softmax(stream.products(absorbed), dim=0)
        context = stream.sums(p).unflatten(0, (n_heads, q))  # [H,Q,E]
        values = context @ read_v[i].unflatten(0, (n_heads, width // n_heads)).transpose(1, 2)  # [H,Q,d/H]
        z = z + values.transpose(0, 1).flatten(1) @ read_out[i].T
        gate, up = (_norm(z, mlp_norm[i]) @ mlp_gate_up[i].T).chunk(2, dim=-1)
        z = z + (F.silu(gate) * up) @ mlp_down[i].T
    s = _norm(z, score_norm)
    absorbed = _absorb(s @ score_k.T, score_q, n_heads).flatten(0, 1)
    products = stream.products(torch.cat((absorbed, direct)))  # [N, H*Q+J]
    logits = products[:, : n_heads * q].unflatten(1, (n_heads, q))  # [N,H,Q]
    values = (s @ score_v.T).unflatten(1, (n_heads, -1 if score_v.shape[0] else 0))  # [Q,H,dv]
    attended = torch.einsum("nhq,qhv->nhv", torch.softmax(logits, dim=-1), values).flatten(1)
    match = torch.logsumexp(logits, dim=-1) - math.log(q)
    inputs = torch.cat((attended, match, products[:, n_heads * q :], features), dim=-1)
    scores = F.silu(inputs @ head_in.T + head_bias) @ head_out.T + head_out_bias
    return scores if legal is None else torch.where(legal, scores, scores.new_zeros(n, 2))


def result_dtype(entries: Tensor, features: Tensor, weight: Tensor) -> torch.dtype:
    """fp32, or fp64 where an input is."""
    acc = torch.promote_types(accumulate_dtype(entries.dtype), accumulate_dtype(weight.dtype))
    return torch.promote_types(acc, features.dtype)


@register("lens_score", "ref")
def lens_score_ref(
    entries: Tensor, features: Tensor, queries: Tensor, w_in: Tensor, read_norm: Tensor, read_q: Tensor, read_k: Tensor,
    read_v: Tensor, read_out: Tensor, mlp_norm: Tensor, mlp_gate_up: Tensor, mlp_down: Tensor, score_norm: Tensor,
    score_q: Tensor, score_k: Tensor, score_v: Tensor, direct: Tensor, head_in: Tensor, head_bias: Tensor,
    head_out: Tensor, head_out_bias: Tensor, legal: Tensor | None, n_heads: int,
) -> Tensor:  # fmt: skip
    """Returns scores [N,2]."""
    acc = result_dtype(entries, features, w_in)
    if entries.shape[0] == 0:
        return entries.new_zeros(0, 2, dtype=acc)
    tensors = (
        entries, features, queries, w_in, read_norm, read_q, read_k, read_v, read_out, mlp_norm, mlp_gate_up, mlp_down,
        score_norm, score_q, score_k, score_v, direct, head_in, head_bias, head_out, head_out_bias,
    )  # fmt: skip
    return score_formula([x.to(acc) for x in tensors], legal, n_heads)


@register("lens_score_backward", "ref")
def lens_score_backward_ref(grad: Tensor, *args: Tensor | int | None) -> tuple[Tensor, ...]:
    """Gradients for entries, features, queries and the 18 weights in their dtypes: recomputes and differentiates.

    args: those of `lens_score_ref`.
    """
    *given, legal, n_heads = args
    tensors = [x for x in given if isinstance(x, Tensor)]
    if tensors[0].shape[0] == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    return tuple(differentiate(lambda *inputs: lens_score_ref(*inputs, legal, n_heads), tensors, [grad]))
