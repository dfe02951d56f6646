"""Backward of `gist_encode` in Triton: gradients for blocks and the 13 weights, in their dtypes.

Recomputes the forward with its own kernels, keeps for each layer the residual stream before each half and attention's
output (3 Eg numbers a row), and makes queries, keys, values and gates anew on the way back. The products are torch's
(cuBLAS), on operands in the forward's compute dtype with fp32 sums; norms, attention, SwiGLU, pooling and the RMS match
are kernels of `triton_gradients`. Deterministic as far as torch's products are. N = 0 gives zeros.
At its largest a row takes (3 layers + 4) Eg + 4 F numbers of memory: 25 KB for the default net in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_gradients import (
    attention_backward_kernel,
    match_backward_kernel,
    norm_backward_kernel,
    norm_kernel,
    pool_backward_kernel,
    rotate_kernel,
    swiglu_backward_kernel,
)
from .triton_kernel import layer_launches, plan_of, pool_launches
from .triton_net import Buffers, Net, compute_dtype
from .triton_plan import Launch, power

Run = Callable[[Launch], None]
_ELEMENTS = 1024  # of a program that goes element by element
_PARTS = 512  # programs of a norm's backward, each with its part of the gain's gradient


def gist_encode_backward_triton(grad: Tensor, blocks: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """grad [N, G, E]; the op's flat arguments."""
    if blocks.shape[0] == 0:
        return tuple(torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (blocks, *args[:13]))
    return backward(grad, blocks, Net.of(args), Launch.run)


def backward(grad: Tensor, blocks: Tensor, net: Net, run: Run) -> tuple[Tensor, ...]:
    """`run` launches a kernel (or lists what would be launched, on tensors without data)."""
    dtype, device = compute_dtype(blocks, net), blocks.device
    n, k, embed = blocks.shape
    width, rows = net.width, n * net.rows(k)
    weights = [x.to(dtype) for x in (net.w_in, net.qkv, net.attn_out, net.gate_up, net.down, net.w_out)]
    w_in, qkv_w, out_w, gate_up_w, down_w, w_out = weights
    grads = {
        name: torch.empty(x.shape, dtype=x.dtype, device=device)
        for name, x in net._asdict().items()
        if isinstance(x, Tensor)
    }

    saved = _recompute(blocks, net, dtype, run)
    dy, d_centred, d_gain = _match(grad.contiguous(), net, saved, n, embed, dtype, run)
    grads["gain"].copy_(d_gain.sum(0, keepdim=True))
    grads["mu"].copy_(-d_centred.sum(0)) if net.level == 1 else grads["mu"].zero_()
    _product(dy.t(), saved.pooled.view(-1, width), grads["w_out"])
    dh = _pool(dy @ w_out, net, saved, n, net.rows(k), grads, run)

    for i in reversed(range(net.layers)):
        before, middle, attention = saved.h[2 * i], saved.h[2 * i + 1], saved.attention[i]
        normed = _norm(middle, net.ffn_norm[i], rows, width, run)
        gate_up, activation = normed @ gate_up_w[i].t(), dh @ down_w[i]
        args = {
            "gate_up": gate_up,
            "dy": activation,
            "n_numbers": rows * net.ffn,
            "FFN": net.ffn,
            "BLOCK": _ELEMENTS,
        }
        run(Launch(swiglu_backward_kernel, triton.cdiv(rows * net.ffn, _ELEMENTS), args))
        _product(dh.t(), activation, grads["down"][i])
        _product(gate_up.t(), normed, grads["gate_up"][i])
        _norm_backward(middle, net.ffn_norm[i], gate_up @ gate_up_w[i], dh, grads["ffn_norm"][i], run)

        _product(dh.t(), attention.view(rows, width), grads["attn_out"][i])
        normed = _norm(before, net.attn_norm[i], rows, width, run)
        qkv = normed @ qkv_w[i].t()
        _attention(qkv, dh @ out_w[i], saved.phases, net, net.rows(k), run)
        _product(qkv.t(), normed, grads["qkv"][i])
        _norm_backward(before, net.attn_norm[i], qkv @ qkv_w[i], dh, grads["attn_norm"][i], run)

    d_blocks = _embed(blocks, net, dh.view(n, net.rows(k), width), w_in, d_centred, grads, run)
    return d_blocks, *grads.values()


def _recompute(blocks: Tensor, net: Net, dtype: torch.dtype, run: Run) -> Buffers:
    n, k, embed = blocks.shape
    rows, gists = n * net.rows(k), n * net.gists

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=blocks.device)

    buffers = Buffers(
        h=[empty(rows, net.width) for _ in range(2 * net.layers + 1)],
        attention=[empty(rows, net.width) for _ in range(net.layers)],
        swiglu=empty(rows, net.ffn),
        pooled=empty(gists, net.width),
        y=empty(gists, embed, dtype=torch.float32),
        centred=empty(n, embed, dtype=torch.float32),
        phases=empty(2, net.rows(k), net.width // net.n_heads // 2, dtype=torch.float32),
    )
    plan = replace(plan_of(blocks, net), layer=None)  # which would not leave what stands between the halves of a layer
    for launch in layer_launches(blocks, net, buffers, plan):
        run(launch)
    for launch in pool_launches(blocks, net, buffers, empty(gists, embed), plan):
        run(launch)
    return buffers


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a b, through the compute dtype where out's is another."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b))


def _row_tile(width: int) -> tuple[dict[str, int], int]:
    """Blocks and warps of a kernel that takes whole rows."""
    block = power(width)
    return {"BLOCK_M": max(1, 4096 // block), "BLOCK_N": block}, 8 if block >= 4096 else 4


def _norm(x: Tensor, gain: Tensor, rows: int, width: int, run: Run) -> Tensor:
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    blocks, warps = _row_tile(width)
    args = {"x": x, "gain": gain, "y": out, "n_rows": rows, "stride_n": width, "stride_k": 0, "K": 1, "WIDTH": width}
    run(Launch(norm_kernel, triton.cdiv(rows, blocks["BLOCK_M"]), args | blocks, warps))
    return out


def _norm_backward(x: Tensor, gain: Tensor, dy: Tensor, dh: Tensor, d_gain: Tensor, run: Run) -> None:
    """Adds the gradient through the norm to dh, in place."""
    rows, width = dh.shape
    blocks, warps = _row_tile(width)
    each = triton.cdiv(rows, blocks["BLOCK_M"] * _PARTS)
    programs = triton.cdiv(rows, blocks["BLOCK_M"] * each)
    parts = torch.empty((programs, width), dtype=torch.float32, device=x.device)
    args = {
        "x": x, "gain": gain, "dy": dy, "add": dh, "dx": dh, "dgain": parts, "n_rows": rows, "stride_n": width,
        "stride_k": 0, "add_scale": 1.0, "K": 1, "ADD_ROWS": 1, "WIDTH": width, "BLOCKS": each,
    }  # fmt: skip
    run(Launch(norm_backward_kernel, programs, args | blocks, warps))
    d_gain.copy_(parts.sum(0))


def _attention(qkv: Tensor, d_out: Tensor, phases: Tensor, net: Net, rows: int, run: Run) -> None:
    """qkv becomes its gradient."""
    head, block = net.width // net.n_heads, power(rows)
    group, numbers = block // rows, qkv.shape[0] * net.width
    common = {"qkv": qkv, "phases": phases, "ROWS": rows, "WIDTH": net.width, "HEAD_DIM": head}
    rotated = common | {"n_numbers": numbers, "BLOCK": _ELEMENTS}
    run(Launch(rotate_kernel, triton.cdiv(numbers, _ELEMENTS), rotated))
    args = {
        "d_out": d_out, "n_rows": qkv.shape[0], "GROUP": group, "BLOCK_M": block, "BLOCK_Q": min(block, 32),
        "HALF_BLOCK": power(head // 2), "HEAD_BLOCK": power(head),
    }  # fmt: skip
    grid = triton.cdiv(qkv.shape[0], group * rows) * net.n_heads
    run(Launch(attention_backward_kernel, grid, common | args, 8 if block * power(head) > 32 * 64 else 4))


def _pool(d_pooled: Tensor, net: Net, saved: Buffers, n: int, rows: int, grads: dict[str, Tensor], run: Run) -> Tensor:
    """Gradient of the residual stream after the last layer [n * rows, Eg]."""
    width, gists, device = net.width, net.gists, d_pooled.device
    dh = torch.empty((n * rows, width), dtype=d_pooled.dtype, device=device)
    d_norm = torch.empty((n, width), dtype=torch.float32, device=device)
    d_query = torch.empty((n, gists, width) if net.pool == "softmax" else (0,), dtype=torch.float32, device=device)
    args = {
        "h": saved.h[-1], "final_norm": net.final_norm, "pool_q": net.pool_q, "d_pooled": d_pooled, "dh": dh,
        "d_norm": d_norm, "d_query": d_query, "stride_q": net.pool_q.stride(0), "ROWS": rows, "WIDTH": width,
        "GISTS": gists, "POOL": net.pool, "ROWS_BLOCK": power(rows), "GIST_BLOCK": power(gists), "BLOCK_K": 64,
    }  # fmt: skip
    run(Launch(pool_backward_kernel, n, args, 8 if rows > 64 else 4))
    grads["final_norm"].copy_(d_norm.sum(0))
    grads["pool_q"].copy_(d_query.sum(0)) if net.pool == "softmax" else grads["pool_q"].zero_()
    return dh


def _match(
    grad: Tensor, net: Net, saved: Buffers, n: int, embed: int, dtype: torch.dtype, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y [N * G, E], centred [N, E] and, a part for each window, gain [N]."""
    dy = torch.empty((n * net.gists, embed), dtype=dtype, device=grad.device)
    d_centred, d_gain = torch.empty_like(saved.centred), torch.empty(n, dtype=torch.float32, device=grad.device)
    block = power(embed)
    args = {
        "grad": grad, "y": saved.y, "centred": saved.centred, "gain": net.gain, "dy": dy, "d_centred": d_centred,
        "d_gain": d_gain, "target_rms": net.target_rms, "GISTS": net.gists, "EMBED": embed, "EMBED_BLOCK": block,
    }  # fmt: skip
    run(Launch(match_backward_kernel, n, args, 8 if block > 2048 else 4))
    return dy, d_centred, d_gain


def _embed(
    blocks: Tensor, net: Net, dh: Tensor, w_in: Tensor, d_centred: Tensor, grads: dict[str, Tensor], run: Run
) -> Tensor:
    """dh [N, rows, Eg] of the first residual stream -> gradient of blocks; level embedding, class token, w_in."""
    n, k, embed = blocks.shape
    row = min(net.level, net.level_emb.shape[0]) - 1
    grads["level_emb"].zero_()[row].copy_(dh.sum((0, 1), dtype=torch.float32))
    if net.pool == "cls":
        grads["pool_q"].copy_(dh[:, k].sum(0, keepdim=True, dtype=torch.float32))
    tokens = dh[:, :k].reshape(n * k, net.width)
    tile, warps = _row_tile(embed)
    normed = torch.empty((n * k, embed), dtype=dh.dtype, device=dh.device)
    source = {
        "x": blocks,
        "gain": None,
        "n_rows": n * k,
        "stride_n": blocks.stride(0),
        "stride_k": blocks.stride(1),
        "K": k,
        "WIDTH": embed,
    }
    run(Launch(norm_kernel, triton.cdiv(n * k, tile["BLOCK_M"]), source | {"y": normed} | tile, warps))
    _product(tokens.t(), normed, grads["w_in"])
    d_blocks = torch.empty((n, k, embed), dtype=blocks.dtype, device=blocks.device)
    target = {
        "dy": tokens @ w_in,
        "add": d_centred,
        "dx": d_blocks,
        "dgain": None,
        "add_scale": 1.0 / k,
        "ADD_ROWS": k,
        "BLOCKS": 1,
    }
    run(Launch(norm_backward_kernel, triton.cdiv(n * k, tile["BLOCK_M"]), source | target | tile, warps))
    return d_blocks
