"""`context_attention`: schema, checks, shape function, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..checks import FP8, accumulate_dtype, describe
from ..cuda_backend import refuse_device as refuse_cuda_device
from ..cuda_backend import register_backward, register_cuda
from ..library import define_op, register_autograd
from ..rope import RopeSpec
from ..triton_backend import refuse_device, refuse_fp64, register_triton
from . import cpu as cpu
from . import ref as ref
from .checks import check_attention

_SCALES = "Tensor? k_scale, Tensor? v_scale"
_ROPE = "Tensor? inv_freq, bool interleaved, float attention_scaling, Tensor? sigma, Tensor? kv_bias, float scale"


def _fake(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(q.dtype)
    mass_shape = (k.shape[0], k.shape[2]) if return_mass else (0,)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=acc), q.new_empty(mass_shape, dtype=acc)


def _fake_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None,
    interleaved: bool, attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float,
    out: Tensor, lse: Tensor, backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias = kv_bias.new_empty(kv_bias.shape) if kv_bias is not None else q.new_empty(0, dtype=accumulate_dtype(q.dtype))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


MOST_TRITON_DIMS = 256


def _refuse_triton(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, *_: object,
) -> str | None:  # fmt: skip
    """Frequencies may be fp64; a head has to fit into a block's shared memory."""
    if k.dtype == FP8:
        return "it reads no float8_e4m3fn keys and values"
    if q.shape[-1] > MOST_TRITON_DIMS:
        return f"expected at most {MOST_TRITON_DIMS} dimensions a head, got D={q.shape[-1]}"
    return refuse_device((q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias)) or refuse_fp64((q, k, v, sigma, kv_bias))


register_triton(
    "context_attention", "mc_kernels.context_attention.triton_kernel", "context_attention_triton", _refuse_triton
)
register_triton(
    "context_attention_backward",
    "mc_kernels.context_attention.triton_backward",
    "context_attention_backward_triton",
    lambda grad_out, *args: _refuse_triton(*args),
)

# Rows (queries times heads of a group) that the CUDA kernels are meant for: each 16 read the keys again.
MOST_CUDA_ROWS, MOST_CUDA_DIMS = 64, 256


def _refuse_cuda(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, *_: object,
) -> str | None:  # fmt: skip
    """As Triton's, and of more rows than a few it is the slower."""
    if q.shape[-1] > MOST_CUDA_DIMS:
        return f"expected at most {MOST_CUDA_DIMS} dimensions a head, got D={q.shape[-1]}"
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if rows > MOST_CUDA_ROWS:
        return f"expected at most {MOST_CUDA_ROWS} queries times heads of a group (decoding), got {rows}"
    return refuse_cuda_device((q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias)) or refuse_fp64((q, k, v))


register_cuda("context_attention", "mc_kernels.context_attention.cuda", "context_attention_cuda", _refuse_cuda)
register_backward(
    "context_attention_backward",
    lambda grad_out, *args: (
        refuse_cuda_device(x for x in (grad_out, *args) if isinstance(x, Tensor))
        or refuse_fp64((*args[:3], *args[8:10]))
    ),
)

_op = define_op(
    "context_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor kv_pos, {_ROPE}, bool return_mass, {_SCALES}, str? backend)"
    " -> (Tensor, Tensor, Tensor)",
    _fake,
)
_op_backward = define_op(
    "context_attention_backward",
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor kv_pos, {_ROPE}, Tensor out, Tensor lse,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, q_pos, kv_pos, inv_freq, interleaved, scaling, sigma, kv_bias, scale, *_, backend = inputs
    out, lse, mass = output
    ctx.mark_non_differentiable(lse, mass)
    ctx.save_for_backward(q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias, out, lse)
    ctx.constants = (interleaved, scaling, scale, backend)


def _backward(ctx: Any, grad_out: Tensor, _lse: Tensor, _mass: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, q_pos, kv_pos, inv_freq, sigma, kv_bias, out, lse = ctx.saved_tensors
    interleaved, scaling, scale, backend = ctx.constants
    dq, dk, dv, dbias = _op_backward(
        grad_out, q, k, v, q_pos, kv_pos, inv_freq, interleaved, scaling, sigma, kv_bias, scale, out, lse, backend
    )
    none = None
    return dq, dk, dv, *[none] * 6, dbias if kv_bias is not None else none, *[none] * 5


register_autograd("context_attention", _backward, _setup_context)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    kv_pos: Tensor,
    rope: RopeSpec | None,
    *,
    sigma: Tensor | None = None,
    kv_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over cache slots with RoPE applied to the keys while they are read.

    Args:
        q: [B, Hq, T, D] queries, unrotated; fp32, bf16 or fp16.
        k, v: [B, Hkv, S, D], keys unrotated, q's dtype, any strides with a contiguous last dimension; Hkv divides Hq.
            Or float8_e4m3fn (an fp8 cache) with any such q.
        q_pos: [B, T] int64 or int32, positions of the queries.
        kv_pos: [B, S] int64 or int32, positions of the slots; -1 marks an empty slot, whose content is never used
            (it must be finite where the backend multiplies before it masks; the caches of this project are).
        rope: rotation of queries and keys (`inv_freq` [D_rot/2]), or None for none.
        sigma: [B, S] >= 0, spread of an entry's position in tokens: damps each band of its key (Gaussian RoPE).
        kv_bias: [B, S], added to the logits of every head and query; receives a gradient.
        scale: multiplies q.k; D**-0.5 by default.
        return_lse: also return lse [B, Hq, T] fp32 (natural logarithm), -inf where a query sees nothing.
        return_mass: also return mass [B, S] fp32: probability received, summed over heads and queries.
        k_scale, v_scale: [Hkv] fp32 > 0, both with an fp8 cache, neither without: an element stands for itself times
            its head's scale (it was divided by that when it was stored). A scale of the whole tensor: `x.expand(Hkv)`.
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can. fp8 caches are read by `cuda` (few
            queries) and `ref`.

    Returns:
        out [B, Hq, T, D] in q's dtype (0 where a query sees nothing), followed by lse and mass where asked.
        Entry s is visible to query t when 0 <= kv_pos[s] <= q_pos[t]. Nothing aliases the inputs.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride or value.
        BackendError: the named backend cannot serve.

    Gradients flow to q, k, v and kv_bias; lse and mass are not differentiable, and nothing is with an fp8 cache.
    Source: RoFormer (Su et al. 2021) for the rotation; FlashAttention-2 (Dao 2023) for the closed-form backward.
    """
    check_attention(q, k, v, q_pos, kv_pos, sigma, kv_bias, k_scale, v_scale, scale)
    inv_freq, interleaved, scaling = None, False, 1.0
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if rope is not None:
        if not isinstance(rope, RopeSpec):
            raise TypeError(f"rope: expected a RopeSpec or None, got {describe(rope)}")
        rope.check_head_dim(q.shape[-1])
        if rope.inv_freq.dim() != 1:
            raise ValueError("rope: expected inv_freq [D_rot/2] (one layer at a time), got one row per layer")
        if rope.rotary_dim:
            inv_freq, interleaved, scaling = rope.inv_freq_on(q.device), rope.interleaved, rope.attention_scaling
        else:  # nothing turns, and there is no band to damp
            scale, sigma = scale * rope.attention_scaling**2, None
    elif sigma is not None:
        raise ValueError("sigma: expected None without rope (it damps rotary bands), got a tensor")
    out, lse, mass = _op(
        q, k, v, q_pos, kv_pos, inv_freq, interleaved, scaling, sigma, kv_bias, scale, return_mass, k_scale, v_scale,
        backend,
    )  # fmt: skip
    extras = ([lse] if return_lse else []) + ([mass] if return_mass else [])
    return (out, *extras) if extras else out
