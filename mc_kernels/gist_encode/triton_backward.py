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

from ..registry import BackendError
from ..triton_arena import Arena
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
Gradients = tuple[Tensor, ...]
_ELEMENTS = 1024  # of a program that goes element by element
_PARTS = 512  # programs of a norm's backward, each with its part of the gain's gradient


def gist_encode_backward_workspace(blocks: Tensor, *args: Any) -> int:
    """Bytes of `workspace` that `gist_encode_backward_triton` needs for blocks and the op's arguments after them; only
    shapes and dtypes matter."""
    blocks, *rest = (x.to("meta") if isinstance(x, Tensor) else x for x in (blocks, *args))
    if blocks.shape[0] == 0:
        return 0
    arena, net = Arena(None), Net.of(rest)
    out = (blocks, *net.weights())
    backward(blocks.new_empty(blocks.shape[0], net.gists, blocks.shape[2]), blocks, net, out, arena, lambda _: None)
    return arena.bytes


def gist_encode_backward_triton(
    grad: Tensor, blocks: Tensor, *args: Any, out: Gradients | None = None, workspace: Tensor | None = None
) -> Gradients:
    """grad [N, G, E]; the op's flat arguments.

    out: gradients of blocks and the 13 weights, of their shapes and dtypes, contiguous, overwritten. workspace: uint8,
    contiguous, aligned to 256 bytes, at least `gist_encode_backward_workspace` bytes. With both, and with grad
    contiguous and weights with a contiguous last dimension, no tensor is allocated (torch's products and sums keep
    their own scratch memory, as a CUDA graph allows). Raises BackendError if either does not fit.
    """
    inputs = (blocks, *args[:13])
    if out is None:
        out = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs)
    for x, like in zip(out, inputs, strict=True):
        if x.shape != like.shape or x.dtype != like.dtype or not x.is_contiguous():
            expected = f"contiguous {like.dtype} {list(like.shape)}"
            raise BackendError(f"out: expected {expected}, got {x.dtype} {list(x.shape)}")
    if blocks.shape[0] == 0:
        for x in out:
            x.zero_()
        return out
    size = gist_encode_backward_workspace(blocks, *args)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.uint8, device=blocks.device)
    elif workspace.dtype != torch.uint8 or workspace.numel() < size or not workspace.is_contiguous():
        raise BackendError(f"workspace: expected uint8 [{size}] or more, got {workspace.dtype} {list(workspace.shape)}")
    with torch.cuda.device_of(blocks):
        backward(grad, blocks, Net.of(args), out, Arena(workspace), Launch.run)
    return out


def backward(grad: Tensor, blocks: Tensor, net: Net, out: Gradients, arena: Arena, run: Run) -> None:
    """`run` launches a kernel (or lists what would be launched, on tensors without data)."""
    dtype = compute_dtype(blocks, net)
    n, k, embed = blocks.shape
    width, rows = net.width, n * net.rows(k)
    weights = (net.w_in, net.qkv, net.attn_out, net.gate_up, net.down, net.w_out)
    w_in, qkv_w, out_w, gate_up_w, down_w, w_out = (_converted(x, dtype, arena) for x in weights)
    d_blocks, *d_weights = out
    grads = dict(zip(Net._fields, d_weights, strict=False))

    saved = _recompute(blocks, net, dtype, arena, run)
    dy, d_centred, d_gain = _match(grad.contiguous(), net, saved, n, embed, dtype, arena, run)
    _sum(d_gain.view(n, 1), grads["gain"], arena)
    if net.level == 1:
        _sum(d_centred, grads["mu"], arena)
        grads["mu"].neg_()
    else:
        grads["mu"].zero_()
    _product(dy.t(), saved.pooled.view(-1, width), grads["w_out"], arena)
    d_pooled = torch.mm(dy, w_out, out=arena.take(dtype, dy.shape[0], width))
    dh = _pool(d_pooled, net, saved, n, net.rows(k), grads, arena, run)

    for i in reversed(range(net.layers)):
        before, middle, attention = saved.h[2 * i], saved.h[2 * i + 1], saved.attention[i]
        with arena.scope():
            normed = _norm(middle, net.ffn_norm[i], rows, width, arena, run)
            gate_up = torch.mm(normed, gate_up_w[i].t(), out=arena.take(dtype, rows, 2 * net.ffn))
            activation = torch.mm(dh, down_w[i], out=arena.take(dtype, rows, net.ffn))
            args = {"gate_up": gate_up, "dy": activation, "n_numbers": rows * net.ffn, "FFN": net.ffn}
            launch = args | {"BLOCK": _ELEMENTS}
            run(Launch(swiglu_backward_kernel, triton.cdiv(rows * net.ffn, _ELEMENTS), launch))
            _product(dh.t(), activation, grads["down"][i], arena)
            _product(gate_up.t(), normed, grads["gate_up"][i], arena)
            d_normed = torch.mm(gate_up, gate_up_w[i], out=normed)
            _norm_backward(middle, net.ffn_norm[i], d_normed, dh, grads["ffn_norm"][i], arena, run)

        with arena.scope():
            _product(dh.t(), attention.view(rows, width), grads["attn_out"][i], arena)
            normed = _norm(before, net.attn_norm[i], rows, width, arena, run)
            qkv = torch.mm(normed, qkv_w[i].t(), out=arena.take(dtype, rows, 3 * width))
            d_attention = torch.mm(dh, out_w[i], out=arena.take(dtype, rows, width))
            _attention(qkv, d_attention, saved.phases, net, net.rows(k), run)
            _product(qkv.t(), normed, grads["qkv"][i], arena)
            d_normed = torch.mm(qkv, qkv_w[i], out=normed)
            _norm_backward(before, net.attn_norm[i], d_normed, dh, grads["attn_norm"][i], arena, run)

    _embed(blocks, net, dh.view(n, net.rows(k), width), w_in, d_centred, d_blocks, grads, arena, run)


def _converted(x: Tensor, dtype: torch.dtype, arena: Arena) -> Tensor:
    return x if x.dtype == dtype else arena.take(dtype, *x.shape).copy_(x)


def _sum(x: Tensor, into: Tensor, arena: Arena) -> None:
    """`into` becomes the sum of x over all but the last dimension, in fp32."""
    dims = tuple(range(x.dim() - 1))
    if into.dtype == torch.float32:
        torch.sum(x, dims, dtype=torch.float32, out=into)
    else:
        with arena.scope():
            into.copy_(torch.sum(x, dims, dtype=torch.float32, out=arena.take(torch.float32, *into.shape)))


def _recompute(blocks: Tensor, net: Net, dtype: torch.dtype, arena: Arena, run: Run) -> Buffers:
    n, k, embed = blocks.shape
    rows, gists = n * net.rows(k), n * net.gists

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return arena.take(dtype, *shape)

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


def _product(a: Tensor, b: Tensor, out: Tensor, arena: Arena) -> None:
    """out = a b, through the compute dtype where out's is another."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        with arena.scope():
            out.copy_(torch.mm(a, b, out=arena.take(a.dtype, *out.shape)))


def _row_tile(width: int) -> tuple[dict[str, int], int]:
    """Blocks and warps of a kernel that takes whole rows."""
    block = power(width)
    return {"BLOCK_M": max(1, 4096 // block), "BLOCK_N": block}, 8 if block >= 4096 else 4


def _norm(x: Tensor, gain: Tensor, rows: int, width: int, arena: Arena, run: Run) -> Tensor:
    out = arena.take(x.dtype, rows, width)
    blocks, warps = _row_tile(width)
    args = {"x": x, "gain": gain, "y": out, "n_rows": rows, "stride_n": width, "stride_k": 0, "K": 1, "WIDTH": width}
    run(Launch(norm_kernel, triton.cdiv(rows, blocks["BLOCK_M"]), args | blocks, warps))
    return out


def _norm_backward(x: Tensor, gain: Tensor, dy: Tensor, dh: Tensor, d_gain: Tensor, arena: Arena, run: Run) -> None:
    """Adds the gradient through the norm to dh, in place."""
    rows, width = dh.shape
    blocks, warps = _row_tile(width)
    each = triton.cdiv(rows, blocks["BLOCK_M"] * _PARTS)
    programs = triton.cdiv(rows, blocks["BLOCK_M"] * each)
    parts = arena.take(torch.float32, programs, width)
    args = {
        "x": x, "gain": gain, "dy": dy, "add": dh, "dx": dh, "dgain": parts, "n_rows": rows, "stride_n": width,
        "stride_k": 0, "add_scale": 1.0, "K": 1, "ADD_ROWS": 1, "WIDTH": width, "BLOCKS": each,
    }  # fmt: skip
    run(Launch(norm_backward_kernel, programs, args | blocks, warps))
    _sum(parts, d_gain, arena)


def _attention(qkv: Tensor, d_out: Tensor, phases: Tensor, net: Net, rows: int, run: Run) -> None:
    """qkv becomes its gradient."""
    head, block = net.width // net.n_heads, power(rows)
    group, numbers = block // rows, qkv.shape[0] * net.width
    common = {"qkv": qkv, "phases": phases, "ROWS": rows, "WIDTH": net.width, "HEAD_DIM": head}
    rotated = common | {"n_numbers": numbers, "BLOCK": _ELEMENTS}
    run(Launch(rotate_kernel, triton.cdiv(numbers, _ELEMENTS), rotated))
    args = {
        "d_out": d_out, "n_rows": qkv.shape[0], "GROUP": group, "BLOCK_M": block,
        "BLOCK_Q": min(block, 32) if block <= 64 else 16,
        "HALF_BLOCK": power(head // 2), "HEAD_BLOCK": power(head),
    }  # fmt: skip
    grid = triton.cdiv(qkv.shape[0], group * rows) * net.n_heads
    # 128 rows: less in flight and fewer queries at a time, or it spills everywhere (sm_80: 64 bytes a thread still).
    warps, stages = 8 if block * power(head) > 32 * 64 else 4, 3 if block <= 64 else 1
    run(Launch(attention_backward_kernel, grid, common | args, warps, stages))


def _pool(
    d_pooled: Tensor, net: Net, saved: Buffers, n: int, rows: int, grads: dict[str, Tensor], arena: Arena, run: Run
) -> Tensor:
    """Gradient of the residual stream after the last layer [n * rows, Eg]."""
    width, gists = net.width, net.gists
    dh = arena.take(d_pooled.dtype, n * rows, width)
    d_norm = arena.take(torch.float32, n, width)
    d_query = arena.take(torch.float32, *((n, gists * width) if net.pool == "softmax" else (0,)))
    args = {
        "h": saved.h[-1], "final_norm": net.final_norm, "pool_q": net.pool_q, "d_pooled": d_pooled, "dh": dh,
        "d_norm": d_norm, "d_query": d_query, "stride_q": net.pool_q.stride(0), "ROWS": rows, "WIDTH": width,
        "GISTS": gists, "POOL": net.pool, "ROWS_BLOCK": power(rows), "GIST_BLOCK": power(gists), "BLOCK_K": 64,
    }  # fmt: skip
    run(Launch(pool_backward_kernel, n, args, 8 if rows > 64 else 4))
    _sum(d_norm, grads["final_norm"], arena)
    if net.pool == "softmax":
        _sum(d_query, grads["pool_q"].view(-1), arena)
    else:
        grads["pool_q"].zero_()
    return dh


def _match(
    grad: Tensor, net: Net, saved: Buffers, n: int, embed: int, dtype: torch.dtype, arena: Arena, run: Run
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y [N * G, E], centred [N, E] and, a part for each window, gain [N]."""
    dy = arena.take(dtype, n * net.gists, embed)
    d_centred, d_gain = arena.take(torch.float32, n, embed), arena.take(torch.float32, n)
    block = power(embed)
    args = {
        "grad": grad, "y": saved.y, "centred": saved.centred, "gain": net.gain, "dy": dy, "d_centred": d_centred,
        "d_gain": d_gain, "target_rms": net.target_rms, "GISTS": net.gists, "EMBED": embed, "EMBED_BLOCK": block,
    }  # fmt: skip
    run(Launch(match_backward_kernel, n, args, 8 if block > 2048 else 4))
    return dy, d_centred, d_gain


def _embed(
    blocks: Tensor, net: Net, dh: Tensor, w_in: Tensor, d_centred: Tensor, d_blocks: Tensor, grads: dict[str, Tensor],
    arena: Arena, run: Run,
) -> None:  # fmt: skip
    """dh [N, rows, Eg] of the first residual stream -> gradient of blocks; level embedding, class token, w_in."""
    n, k, embed = blocks.shape
    row = min(net.level, net.level_emb.shape[0]) - 1
    _sum(dh, grads["level_emb"].zero_()[row], arena)
    tokens = dh.view(-1, net.width)
    if net.pool == "cls":
        _sum(dh[:, k], grads["pool_q"][0], arena)
        tokens = arena.take(dh.dtype, n, k, net.width).copy_(dh[:, :k]).view(n * k, net.width)
    tile, warps = _row_tile(embed)
    normed = arena.take(dh.dtype, n * k, embed)
    source = {
        "x": blocks, "gain": None, "n_rows": n * k, "stride_n": blocks.stride(0), "stride_k": blocks.stride(1), "K": k,
        "WIDTH": embed,
    }  # fmt: skip
    run(Launch(norm_kernel, triton.cdiv(n * k, tile["BLOCK_M"]), source | {"y": normed} | tile, warps))
    _product(tokens.t(), normed, grads["w_in"], arena)
    target = {
        "dy": torch.mm(tokens, w_in, out=normed), "add": d_centred, "dx": d_blocks, "dgain": None,
        "add_scale": 1.0 / k, "ADD_ROWS": k, "BLOCKS": 1,
    }  # fmt: skip
    run(Launch(norm_backward_kernel, triton.cdiv(n * k, tile["BLOCK_M"]), source | target | tile, warps))
