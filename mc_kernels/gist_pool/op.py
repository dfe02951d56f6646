"""`gist_pool`: schema, checks, shape function, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import (
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    describe,
)
from ..cuda_backend import register_backward, register_cuda
from ..library import define_op, register_autograd
from ..triton_backend import register_triton
from . import cpu as cpu
from . import ref as ref
from .triton_tiling import supports as triton_supports
from .weights import GistPoolWeights

_ARGS = "Tensor k, Tensor v, Tensor w, Tensor b, Tensor m, Tensor c"


def _fake(
    k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r, h, n, _, d = k.shape
    shape = (r, h, n, w.shape[2], d)
    return k.new_empty(shape), v.new_empty(shape)


def _fake_backward(
    grad_k: Tensor, grad_v: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor,
    need_kv: bool, need_weights: bool, backend: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    def new(x: Tensor, needed: bool) -> Tensor:
        return x.new_empty(x.shape if needed else (0,))

    return (*(new(x, need_kv) for x in (k, v)), *(new(x, need_weights) for x in (w, b, m, c)))


_op = define_op("gist_pool", f"({_ARGS}, str? backend) -> (Tensor, Tensor)", _fake)
_op_backward = define_op(
    "gist_pool_backward",
    f"(Tensor grad_k, Tensor grad_v, {_ARGS}, bool need_kv, bool need_weights, str? backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = backend


def _backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
    # A frozen base model needs no gradient for its cache: half of the traffic.
    need_kv, need_weights = any(ctx.needs_input_grad[:2]), any(ctx.needs_input_grad[2:6])
    grads = _op_backward(grad_k, grad_v, *ctx.saved_tensors, need_kv, need_weights, ctx.backend)
    needed = (need_kv, need_kv, need_weights, need_weights, need_weights, need_weights)
    return (*(g if n else None for g, n in zip(grads, needed, strict=True)), None)


register_autograd("gist_pool", _backward, _setup_context)
register_triton("gist_pool", "mc_kernels.gist_pool.triton_kernel", "gist_pool_triton", triton_supports)
register_triton(
    "gist_pool_backward",
    "mc_kernels.gist_pool.triton_backward",
    "gist_pool_backward_triton",
    lambda grad_k, grad_v, *args: triton_supports(*args[:6]),
)
register_cuda("gist_pool", "mc_kernels.gist_pool.cuda", "gist_pool_cuda")
register_backward("gist_pool_backward")


def gist_pool(k: Tensor, v: Tensor, weights: GistPoolWeights, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Pool every block of K cached keys and values into G gists, per layer and KV head.

    Args:
        k, v: [R, Hkv, N, K, D], keys unrotated; fp32, bf16 or fp16; any strides with a contiguous last dimension, so
            that views straight into a cache do. R = L x batch, layer-major: row r uses layer r // (R / L) of the
            weights, as a cache [L, B, ...] flattened over its first two dimensions has it.
        weights: of this level; its L divides R, its Hkv, K and D are those of k. Its dtype may differ from k's (fp32
            master weights on a bf16 cache).
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can.

    Returns:
        k_gist, v_gist: [R, Hkv, N, G, D] each in k's dtype, keys unrotated, contiguous, aliasing nothing. With
        `GistPoolWeights.zeros` they are the mean of the block's keys and values. Empty R, Hkv or N give empty outputs.

    Raises:
        TypeError: dtype or device.
        ValueError: shape or stride.
        BackendError: the named backend cannot serve.

    Gradients flow to k, v and every tensor of the weights (once: no second derivative).
    Per row, block and gist, with x_j = [k_j; v_j] and n_j = x_j / rms(x_j) (0 for a zero x_j, see `ref.RMS_EPS`):
    p = softmax_j(n_j . w + b_j), y = sum_j p_j x_j, out = y + y M + c. Source: pooling by a learned query (Lee et al.
    2019, Set Transformer) of cached keys and values, starting as a mean (Rae et al. 2020, Compressive Transformers).
    """
    if not isinstance(weights, GistPoolWeights):
        raise TypeError(f"weights: expected GistPoolWeights, got {describe(weights)}")
    check_tensor("k", k, ORACLE_DTYPES)
    check_tensor("v", v, ORACLE_DTYPES)
    dims: dict[str, int] = {}
    check_shape("k", k, ("R", "Hkv", "N", "K", "D"), dims)
    check_shape("v", v, ("R", "Hkv", "N", "K", "D"), dims)
    check_same_dtype(("k", k), v=v)
    w, b, m, c = weights.tensors()
    if dims["D"] == 0 or dims["K"] == 0:
        raise ValueError(f"k: expected K >= 1 and D >= 1, got {describe(k)}")
    check_shape("weights.w", w, (None, "Hkv", None, 2 * dims["D"]), dims)
    check_shape("weights.b", b, (None, "Hkv", None, "K"), dims)
    if dims["R"] % weights.layers:
        raise ValueError(f"k: expected R that is a multiple of the weights' L={weights.layers}, got R={dims['R']}")
    check_same_device(("k", k), v=v, weights=w)
    check_contiguous_rows("k", k)
    check_contiguous_rows("v", v)
    return _op(k, v, w, b, m, c, backend)
