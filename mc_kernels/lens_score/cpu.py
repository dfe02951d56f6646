"""`lens_score` on a CPU: csrc/lens_score/cpu.cpp, one stream over the entries per pass, on torch's threads."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..registry import register
from .ref import lens_score_backward_ref


def _supports(entries: Tensor, features: Tensor, queries: Tensor, w_in: Tensor, *_: object) -> str | None:
    if entries.device.type != "cpu":
        return f"expected CPU tensors, got {entries.device}"
    return "fp64 is for the oracle" if torch.float64 in (entries.dtype, features.dtype, w_in.dtype) else None


def _rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, a copy only where it has none."""
    return x if x.stride(-1) == 1 or x.shape[-1] < 2 else x.contiguous()


@register("lens_score", "cpu", available=native.available, supports=_supports)
def lens_score_cpu(
    entries: Tensor, features: Tensor, queries: Tensor, w_in: Tensor, read_norm: Tensor, read_q: Tensor, read_k: Tensor,
    read_v: Tensor, read_out: Tensor, mlp_norm: Tensor, mlp_gate_up: Tensor, mlp_down: Tensor, score_norm: Tensor,
    score_q: Tensor, score_k: Tensor, score_v: Tensor, direct: Tensor, head_in: Tensor, head_bias: Tensor,
    head_out: Tensor, head_out_bias: Tensor, legal: Tensor | None, n_heads: int,
) -> Tensor:  # fmt: skip
    """See `ref.lens_score_ref`. Sums are fp32, whatever the inputs; what entries are multiplied with is rounded to bf16
    where entries and weights are, if the processor multiplies it."""
    out = torch.empty(entries.shape[0], 2, dtype=torch.float32)
    weights = tuple(
        _rows(x)
        for x in (
            w_in, read_norm, read_q, read_k, read_v, read_out, mlp_norm, mlp_gate_up, mlp_down, score_norm, score_q,
            score_k, score_v, direct, head_in, head_bias, head_out, head_out_bias,
        )
    )  # fmt: skip
    # Held in a name: the library gets its address.
    mask = None if legal is None else legal.contiguous()
    native.library().lens_score(
        entries,
        features,
        queries,
        weights,
        n_heads,
        native.address(mask),
        out,
        torch.get_num_threads(),
    )
    return out


# It recomputes the forward from the inputs.
register("lens_score_backward", "cpu")(lens_score_backward_ref)
