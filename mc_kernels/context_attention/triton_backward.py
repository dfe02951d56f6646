"""Host code of the backward of `context_attention` in Triton; the kernels and their cost are in triton_grad.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .triton_grad import delta_kernel, grad_keys_kernel, grad_queries_kernel, sum_heads_kernel
from .triton_launch import Heads, Scratch, carve, check_out, launch, scratch_bytes, skips_future, strides, turning
from .triton_rotate import rotated

Grads = tuple[Tensor, Tensor, Tensor, Tensor]


def _scratch(q: Tensor, k: Tensor, kv_bias: Tensor | None, heads: Heads) -> Scratch:
    (b, hq, t, _), (hkv, s) = q.shape, k.shape[1:3]
    found: Scratch = dict.fromkeys(("delta", "share"), ((b, hq, t), torch.float32))
    if heads.half_rot:
        found["q"] = ((b, hq, t, heads.padded), q.dtype)
        found["k"] = ((b, hkv, s, heads.padded), q.dtype)
    if kv_bias is not None:
        found["bias"] = ((b, hkv, s), torch.float32)
    return found


def _blocks_of_queries(dtype: torch.dtype, heads: Heads) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_S and warps: the largest blocks that spill no registers."""
    if heads.padded > 128:
        return (16, 16, 4) if dtype == torch.float32 else (32, 16, 8)
    if dtype == torch.float32:
        return 32, 32, 8 if heads.padded > 64 else 4
    return (64, 32, 8) if heads.padded > 64 else (64, 64, 4)


def _blocks_of_keys(dtype: torch.dtype, heads: Heads) -> tuple[int, int, int]:
    """As above; this kernel holds two gradients of its block."""
    if dtype == torch.float32:
        return 16, 32 if heads.padded <= 128 else 16, 8
    if heads.padded > 64:
        return (64, 32, 8) if heads.padded <= 128 else (32, 32, 8)
    return 32, 64, 4


def context_attention_backward_workspace(q: Tensor, k: Tensor, inv_freq: Tensor | None, kv_bias: Tensor | None) -> int:
    """Bytes of workspace that `context_attention_backward_triton` needs for these (only shapes and dtype matter)."""
    if q.numel() == 0 or k.numel() == 0:
        return 0
    return scratch_bytes(_scratch(q, k, kv_bias, Heads.of(q, k, inv_freq, False)))


def context_attention_backward_triton(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None,
    interleaved: bool, attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float,
    out: Tensor, lse: Tensor, *, grads: Grads | None = None, workspace: Tensor | None = None,
) -> Grads:  # fmt: skip
    """See `ref.context_attention_backward_ref`. out and lse are the forward's.

    grads: gradients of q, k, v and kv_bias ([0] fp32 where there is none) in their dtypes, contiguous, overwritten.
        workspace: uint8, `context_attention_backward_workspace` bytes. Given both, and lse, `inv_freq` and the last
        dimension of grad_out and out contiguous, nothing is allocated.
    """
    (b, hq, t, d), (hkv, s) = q.shape, k.shape[1:3]
    bias_like = ((0,), torch.float32) if kv_bias is None else (tuple(kv_bias.shape), kv_bias.dtype)
    wanted = [(tuple(x.shape), x.dtype) for x in (q, k, v)] + [bias_like]
    if grads is None:
        dq, dk, dv, dbias = (torch.empty(shape, dtype=dtype, device=q.device) for shape, dtype in wanted)
        grads = (dq, dk, dv, dbias)
    for name, grad, like in zip(("q", "k", "v", "kv_bias"), grads, wanted, strict=True):
        check_out(f"gradient of {name}", grad, like, contiguous=True)
    if q.numel() == 0 or s == 0:
        for grad in grads:
            grad.zero_()
        return grads
    grad_q, grad_k, grad_v, grad_bias = grads
    # Autograd hands over expanded gradients.
    grad_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad_out, out))
    scale = scale if inv_freq is None else scale * attention_scaling**2
    inv_freq = turning(inv_freq)
    lse = lse.contiguous()
    heads = Heads.of(q, k, inv_freq, interleaved)
    scratch = carve(_scratch(q, k, kv_bias, heads), workspace, q.device)

    with torch.cuda.device_of(q):
        args = {
            "grad_out": grad_out, "out": out, "delta": scratch["delta"],
            **strides(grad=(grad_out, "bht"), out=(out, "bht")), "heads": hq, "T": t, "all_rows": b * hq * t,
        }  # fmt: skip
        launch(delta_kernel, math.ceil(b * hq * t / 16), args, {"D": d, "D_PAD": heads.padded, "BLOCK_R": 16})
        if inv_freq is not None:
            q = rotated(q, q_pos, inv_freq, None, heads, scratch["q"])
            k = rotated(k, kv_pos, inv_freq, sigma, heads, scratch["k"])
        constants = {
            "G": heads.group, "D": d, "D_PAD": heads.padded, "QK_D": q.shape[-1], "HALF": heads.padded // 2,
            "HALF_ROT": heads.half_rot, "INTERLEAVED": heads.interleaved, "ROTATE": inv_freq is not None,
            "SKIP_FUTURE": skips_future(t, s),
        }  # fmt: skip
        args = {
            "q": q, "k": k, "v": v, "q_pos": q_pos, "kv_pos": kv_pos, "inv_freq": inv_freq, "kv_bias": kv_bias,
            "grad_out": grad_out, "lse": lse, "share": scratch["share"], "delta": scratch["delta"],
            **strides(q=(q, "bht"), k=(k, "bhs"), v=(v, "bhs"), grad=(grad_out, "bht"), bias=(kv_bias, "bs")),
            **strides(q_pos=(q_pos, "bt"), kv_pos=(kv_pos, "bs")), "kv_heads": hkv, "T": t, "S": s,
            "scale": scale,
        }  # fmt: skip
        block_m, block_s, warps = _blocks_of_queries(q.dtype, heads)
        constants |= {"BLOCK_M": block_m, "BLOCK_S": block_s}
        programs = b * hkv * math.ceil(heads.group * t / block_m)
        launch(grad_queries_kernel, programs, {**args, "grad_q": grad_q}, constants, warps)
        block_m, block_s, warps = _blocks_of_keys(q.dtype, heads)
        constants |= {"BLOCK_M": block_m, "BLOCK_S": block_s}
        args |= {
            "sigma": sigma, **strides(sigma=(sigma, "bs")), "grad_k": grad_k, "grad_v": grad_v,
            "grad_bias": scratch.get("bias"),
        }  # fmt: skip
        launch(grad_keys_kernel, b * hkv * math.ceil(s / block_s), args, constants, warps)
        if kv_bias is not None:
            args = {
                "parts": scratch["bias"], "total": grad_bias, "heads": hkv, "S": s,
                **strides(total=(grad_bias, "bs")),
            }  # fmt: skip
            launch(sum_heads_kernel, b * math.ceil(s / 128), args, {"BLOCK_S": 128})
    return grads
