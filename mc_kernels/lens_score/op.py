"""`lens_score`: schema, checks, shape function, autograd; and the fold into one signed score."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import (
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    describe,
    is_finite,
)
from ..cuda_backend import refuse as refuse_cuda
from ..cuda_backend import register_backward, register_cuda
from ..library import define_op, register_autograd
from ..triton_backend import power_of_two, refuse, register_triton
from . import cpu as cpu
from . import ref as ref
from .weights import SHAPES, LensScoreWeights

MAX_QUERIES = 16
CUDA_VECTORS = 128
_TENSORS = ", ".join(f"Tensor {name}" for name in ("entries", "features", "queries", *SHAPES))
_CONSTANTS = "Tensor? legal, int n_heads, str? backend"
_N_TENSORS = 3 + len(SHAPES)


def _fake(entries: Tensor, features: Tensor, queries: Tensor, w_in: Tensor, *_: Any, **__: Any) -> Tensor:
    return entries.new_empty(entries.shape[0], 2, dtype=ref.result_dtype(entries, features, w_in))


def _fake_backward(grad: Tensor, *args: Any, **_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[:_N_TENSORS])


_op = define_op("lens_score", f"({_TENSORS}, {_CONSTANTS}) -> Tensor", _fake)
_op_backward = define_op(
    "lens_score_backward",
    f"(Tensor grad, {_TENSORS}, {_CONSTANTS}) -> ({', '.join(['Tensor'] * _N_TENSORS)})",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, n_heads, backend = inputs  # the last tensor is `legal`, which may be None
    ctx.save_for_backward(*tensors)
    ctx.constants = (n_heads, backend)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _op_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return (*grads, None, None, None)


register_autograd("lens_score", _backward, _setup_context)


def _triton_supports(*args: Any) -> str | None:
    """The score pass holds all logits of a block of entries and the head's hidden layer in registers, and what each
    vector adds to the hidden layer in shared memory: 4 bytes of a vector and hidden unit, of the 163 KB of an A100."""
    named = dict(zip(("entries", "features", "queries", *SHAPES), args, strict=False))
    heads, queries, hidden = (
        power_of_two(size) for size in (args[-1], len(named["queries"]), len(named["head_in"]) or 1)
    )
    if heads * queries > 512:
        return f"expected at most 512 vectors, heads times queries as powers of two, got {heads} x {queries}"
    if hidden > 256:
        return f"expected a head of at most 256 hidden units, got {len(named['head_in'])}"
    if heads * queries * max(hidden, 16) > 1 << 15:
        return (
            "expected at most 32768 numbers in vectors times hidden units as powers of two, got"
            f" {heads} x {queries} x {max(hidden, 16)}"
        )
    return refuse(*args)


def _cuda_supports(*args: Any) -> str | None:
    """All vectors that meet the entries are in one tile."""
    vectors = args[-1] * len(args[2]) + len(args[3 + list(SHAPES).index("direct")])
    if vectors > CUDA_VECTORS:
        return f"expected at most {CUDA_VECTORS} vectors, heads times queries and direct rows, got {vectors}"
    return refuse_cuda(*args)


register_triton("lens_score", "mc_kernels.lens_score.triton_kernel", "lens_score_triton", _triton_supports)
register_cuda("lens_score", "mc_kernels.lens_score.cuda", "lens_score_cuda", _cuda_supports)
register_backward("lens_score_backward")
register_triton("lens_score_backward", "mc_kernels.lens_score.triton_backward", "lens_score_backward_triton")


def lens_score(
    entries: Tensor,
    features: Tensor,
    queries: Tensor,
    weights: LensScoreWeights,
    *,
    legal: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Score every entry of the Working Context: what would it gain to be expanded, what would it cost to be collapsed.

    Args:
        entries: [N, E] summary vectors, raw (they are RMS-normalised on the fly); fp32, bf16 or fp16; any strides with
            a contiguous last dimension.
        features: [N, F] fp32, any strides with a contiguous last dimension; of order one (the caller scales them).
        queries: [Q, E] in entries' dtype, 1 <= Q <= 16: pooled recent tokens, latest gists or hidden states.
        weights: its E and F are those of entries and features. Its dtype may differ from entries'.
        legal: [N, 2] bool, may the entry be expanded, may it be collapsed; None where all may. LOD0 has nothing to
            expand into, roots and pinned leaves are not collapsed.
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can.

    Returns:
        scores [N, 2] fp32 in nats: column 0 the gain of expanding, column 1 the cost of collapsing, of either sign;
        exactly 0 where not legal (and there no gradient). Untrained weights score exactly 0. Aliases nothing.
        N = 0 gives an empty output.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride or value.
        BackendError: the named backend cannot serve.

    Gradients flow to entries, features, queries and every tensor of the weights (once: no second derivative).
    The formula, and how every projection is absorbed into the side of the queries, is in `ref`.
    """
    if not isinstance(weights, LensScoreWeights):
        raise TypeError(f"weights: expected LensScoreWeights, got {describe(weights)}")
    check_tensor("entries", entries, ORACLE_DTYPES)
    check_tensor("features", features, (torch.float32, torch.float64))
    check_tensor("queries", queries, ORACLE_DTYPES)
    dims = {"E": weights.embed_dim, "F": weights.n_features}
    check_shape("entries", entries, ("N", "E"), dims)
    check_shape("features", features, ("N", "F"), dims)
    check_shape("queries", queries, ("Q", "E"), dims)
    if not 1 <= dims["Q"] <= MAX_QUERIES:
        raise ValueError(f"queries: expected 1 <= Q <= {MAX_QUERIES}, got Q={dims['Q']}")
    if legal is not None:
        check_tensor("legal", legal, (torch.bool,))
        check_shape("legal", legal, ("N", 2), dims)
    check_same_dtype(("entries", entries), queries=queries)
    check_same_device(("entries", entries), features=features, queries=queries, legal=legal, weights=weights.w_in)
    for name, x in (("entries", entries), ("features", features), ("queries", queries)):
        check_contiguous_rows(name, x)
    return _op(entries, features, queries, *weights.tensors(), legal, weights.n_heads, backend)


def signed_score(scores: Tensor, legal: Tensor | None = None, *, price: float = 0.0) -> Tensor:
    """Fold (expand_gain, collapse_cost) into one number per entry: positive asks to expand, negative to collapse.

    Args:
        scores: [N, 2] in nats, as `lens_score` returns them; fp32, bf16, fp16 or fp64.
        legal: [N, 2] bool as for `lens_score`, or None where all is legal. At price 0 it may be left out, since an
            illegal edit scores exactly 0; at any other price it tells a zero score from an illegal edit.
        price: what the slots of one edit are worth, in nats (the budget's shadow price). Expanding is worth
            gain - price, collapsing price - cost; the larger one, if positive, gives magnitude and sign.

    Returns:
        [N] in scores' dtype; 0 where no legal edit is worth its price. At price 0 an entry is collapsed only if that is
        expected to help by itself; under a full budget pass a positive price. Differentiable (plain torch).

    Raises TypeError (dtype, device) or ValueError (shape, price).
    """
    check_tensor("scores", scores, ORACLE_DTYPES)
    dims: dict[str, int] = {}
    check_shape("scores", scores, ("N", 2), dims)
    if not is_finite(price):
        raise ValueError(f"price: expected a finite number, got {price!r}")
    worth = torch.stack((scores[:, 0] - price, price - scores[:, 1]), dim=-1).clamp(min=0)
    if legal is not None:
        check_tensor("legal", legal, (torch.bool,))
        check_shape("legal", legal, ("N", 2), dims)
        check_same_device(("scores", scores), legal=legal)
        worth = torch.where(legal, worth, torch.zeros_like(worth))
    expand, collapse = worth.unbind(-1)
    return torch.where(expand >= collapse, expand, -collapse)
