"""`gist_encode` in Triton, forward: the formula is `ref`'s.

blocks [N, K, E] fp32, bf16 or fp16, any strides with a contiguous last dimension; weights in one such dtype, theirs or
another -> gists [N, G, E] in blocks' dtype. Products take the common 16-bit dtype of blocks and weights, fp32 (no TF32)
where they differ; the residual stream is kept in that dtype, sums are fp32. N = 0 launches nothing. Windows of up to
128 rows (K, or K + 1 with a class token). Deterministic. Nothing is read back to the host.

Launches: embed; per layer attention, output + residual, SwiGLU, down + residual; pool, project, match. Between them the
residual stream (Eg numbers a row), attention's output (Eg) and SwiGLU's (F) travel; queries, keys, values, scores,
normed rows, gates do not.

Floors on an H100 (990 TFLOP/s, 3.35 TB/s), default net (Eg 512, F 1792, two layers), bf16. Streaming: 16 MB of weights
for E = 576, 5 us, against 12 launches; products are cut into column tiles so that many SMs read them. Bulk, N = 4096:
1.0 TFLOP a layer, 1.0 ms, against 15 KB a row and layer, 0.6 ms, which the products hide.

Many rows of nets whose sizes fill the largest tiles: `triton_bulk`, whose norms are in weights and in sums of squares.
Narrow nets (Eg up to 128) and many windows: a layer is one launch, `triton_layers`. Of wider ones the residual rows
and their normed copy spill (`triton_plan`), and at Eg 512 a program of 64 rows would read 7.6 MB of weights for them:
64 FLOPs for each byte out of L2, about 350 TFLOP/s at 5.5 TB/s, below what separate products are meant to reach. One
window would be one SM that reads all weights, 140 us. Hence the pieces, fused up to where a product needs all columns
of what precedes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from ..registry import BackendError
from ..triton_arena import Arena
from ..triton_report import Compilation
from .triton_attention import attention_kernel
from .triton_bulk_launches import bulk_layers, bulk_sizes, gained_launches, is_bulk
from .triton_gradients import attention_backward_kernel
from .triton_layers import layer_kernel
from .triton_linear import embed_kernel, residual_kernel, swiglu_kernel
from .triton_net import Buffers, BulkBuffers, Net, compute_dtype
from .triton_plan import Launch, Plan, heuristics, power
from .triton_pool import match_kernel, pool_kernel, project_kernel

# Rows that go through the net together: bounds the workspace, and is large enough that a kernel's ramp does not count.
CHUNK_ROWS = 32768


def _sizes(blocks: Tensor, net: Net) -> list[tuple[int, torch.dtype]]:
    """Numbers and dtype of h, attention, swiglu, pooled, y, centred, phases, and what bulk kernels need, for blocks."""
    n, k, embed = blocks.shape
    dtype = compute_dtype(blocks, net)
    rows, gists = n * net.rows(k), n * net.gists
    return [
        (rows * net.width, dtype),
        (rows * net.width, dtype),
        (rows * net.ffn, dtype),
        (gists * net.width, dtype),
        (gists * embed, torch.float32),
        (n * embed, torch.float32),
        (net.rows(k) * (net.width // net.n_heads), torch.float32),
        *bulk_sizes(rows, net, plan_of(blocks, net), dtype),
    ]


def _chunk(n: int, rows: int) -> int:
    """Windows that go through the net together."""
    return min(n, max(1, CHUNK_ROWS // rows))


def gist_encode_workspace(blocks: Tensor, *args: Any) -> int:
    """Bytes of `workspace` that `gist_encode_triton` needs for these arguments."""
    net = Net(*args)
    sizes = _sizes(blocks[: _chunk(blocks.shape[0], net.rows(blocks.shape[1]))], net)
    return sum(triton.cdiv(count * dtype.itemsize, 256) * 256 for count, dtype in sizes)


def _carve(workspace: Tensor, sizes: Iterable[tuple[int, torch.dtype]], layers: int) -> Buffers:
    views, start = [], 0
    for count, dtype in sizes:
        size = count * dtype.itemsize
        views.append(workspace[start : start + size].view(dtype))
        start += triton.cdiv(size, 256) * 256
    h, attention, swiglu, pooled, y, centred, phases, *bulk = views
    more = BulkBuffers(*bulk) if bulk else None
    return Buffers([h] * (2 * layers + 1), [attention] * layers, swiglu, pooled, y, centred, phases, more)


def layer_launches(blocks: Tensor, net: Net, buffers: Buffers, plan: Plan) -> Iterator[Launch]:
    """blocks -> buffers.h[-1]."""
    n, k, embed = blocks.shape
    width, ffn, rows_each = net.width, net.ffn, net.rows(k)
    rows, head = n * rows_each, width // net.n_heads
    bulk = buffers.bulk if plan.bulk else None

    def tiles(tile: Any, columns: int) -> int:
        return triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n)

    yield Launch(
        embed_kernel,
        tiles(plan.embed, width) + 1,
        {
            "x": blocks, "w": net.w_in, "level_emb": net.level_emb[min(net.level, net.level_emb.shape[0]) - 1],
            "pool_q": net.pool_q, "h": buffers.h[0], "phases": buffers.phases,
            "sums": bulk.squares if bulk else None, "n_rows": rows,
            "stride_n": blocks.stride(0), "stride_k": blocks.stride(1), "stride_w": net.w_in.stride(0), "one": 1.0,
            "K": k, "ROWS": rows_each, "EMBED": embed, "WIDTH": width, "HALF": head // 2,
            "LOG2_THETA": math.log2(net.rope_theta), **plan.embed.blocks(),
        },
        plan.embed.warps, plan.embed.stages,
    )  # fmt: skip
    if bulk:
        yield from bulk_layers(n, rows_each, net, buffers, plan)
        return
    per_layer = zip(
        *(x.unbind(0) for x in (net.attn_norm, net.qkv, net.attn_out, net.ffn_norm, net.gate_up, net.down)),
        buffers.h[:-1:2], buffers.h[1::2], buffers.h[2::2], buffers.attention, strict=True,
    )  # fmt: skip
    for norm1, qkv, out, norm2, gate_up, down, before, middle, after, attention in per_layer:
        if plan.layer is not None:
            tile = plan.layer
            yield Launch(
                layer_kernel,
                triton.cdiv(n, tile.group),
                {
                    "h": before, "out": after, "phases": buffers.phases, "gain1": norm1, "qkv": qkv, "attn_out": out,
                    "gain2": norm2, "gate_up": gate_up, "down": down, "n_rows": rows, "stride_qkv": qkv.stride(0),
                    "stride_out": out.stride(0), "stride_gate_up": gate_up.stride(0), "stride_down": down.stride(0),
                    "ROWS": rows_each, "WIDTH": width, "FFN": ffn, "HEAD_DIM": head, "GROUP": tile.group,
                    "BLOCK_M": tile.m, "WIDTH_BLOCK": power(width), "CHUNK": tile.chunk,
                },
                tile.warps, tile.stages,
            )  # fmt: skip
            continue
        yield Launch(
            attention_kernel,
            triton.cdiv(n, plan.group) * net.n_heads,
            {
                "h": before, "gain": norm1, "qkv": qkv, "phases": buffers.phases, "att": attention, "n_rows": rows,
                "stride_w": qkv.stride(0), "ROWS": rows_each, "WIDTH": width, "HEAD_DIM": head, "GROUP": plan.group,
                "BLOCK_M": plan.attention.m, "BLOCK_K": plan.attention.k, "HALF_BLOCK": power(head // 2),
                "HEAD_BLOCK": plan.attention.n,
            },
            plan.attention.warps, plan.attention.stages,
        )  # fmt: skip
        yield _residual(attention, out, before, middle, rows, plan.attention_out)
        yield Launch(
            swiglu_kernel,
            tiles(plan.swiglu, ffn),
            {
                "h": middle, "gain": norm2, "w": gate_up, "y": buffers.swiglu, "n_rows": rows,
                "stride_w": gate_up.stride(0), "WIDTH": width, "FFN": ffn, **plan.swiglu.blocks(),
            },
            plan.swiglu.warps, plan.swiglu.stages,
        )  # fmt: skip
        yield _residual(buffers.swiglu, down, middle, after, rows, plan.down)


def _residual(x: Tensor, w: Tensor, residual: Tensor, out: Tensor, rows: int, tile: Any) -> Launch:
    width, inside = w.shape
    args = {
        "x": x, "w": w, "residual": residual, "out": out, "n_rows": rows, "stride_w": w.stride(0), "IN": inside,
        "WIDTH": width, **tile.blocks(),
    }  # fmt: skip
    grid = triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n)
    return Launch(residual_kernel, grid, args, tile.warps, tile.stages)


def pool_launches(blocks: Tensor, net: Net, buffers: Buffers, out: Tensor, plan: Plan) -> Iterator[Launch]:
    """buffers.h[-1] -> out, a contiguous [N, G, E]; leaves `pooled`, `y` and `centred`."""
    n, k, embed = blocks.shape
    width, gists, tile = net.width, net.gists, plan.project
    columns = 128
    yield Launch(
        pool_kernel,
        n * (1 + triton.cdiv(embed, columns)),
        {
            "h": buffers.h[-1], "final_norm": net.final_norm, "pool_q": net.pool_q, "pooled": buffers.pooled,
            "x": blocks, "mu": net.mu, "centred": buffers.centred, "stride_q": net.pool_q.stride(0),
            "stride_n": blocks.stride(0), "stride_k": blocks.stride(1), "K": k, "ROWS": net.rows(k), "EMBED": embed,
            "WIDTH": width, "GISTS": gists, "POOL": net.pool, "CENTRE": net.level == 1,
            "ROWS_BLOCK": power(net.rows(k)), "GIST_BLOCK": power(gists), "BLOCK_K": 64, "BLOCK_N": columns,
        },
    )  # fmt: skip
    yield Launch(
        project_kernel,
        triton.cdiv(n * gists, tile.m) * triton.cdiv(embed, tile.n),
        {
            "pooled": buffers.pooled, "w": net.w_out, "y": buffers.y, "n_gists": n * gists,
            "stride_w": net.w_out.stride(0), "EMBED": embed, "WIDTH": width, **tile.blocks(),
        },
        tile.warps, tile.stages,
    )  # fmt: skip
    block = power(embed)
    yield Launch(
        match_kernel,
        n * gists,
        {
            "y": buffers.y, "centred": buffers.centred, "gain": net.gain, "out": out, "target_rms": net.target_rms,
            "GISTS": gists, "EMBED": embed, "EMBED_BLOCK": block,
        },
        8 if block > 2048 else 4,
    )  # fmt: skip


def plan_of(blocks: Tensor, net: Net) -> Plan:
    n, k, embed = blocks.shape
    half = compute_dtype(blocks, net) != torch.float32
    rows = net.rows(k)
    bulk = not blocks.is_cuda or torch.cuda.get_device_capability(blocks.device)[0] == 9
    return heuristics(n * rows, rows, n * net.gists, embed, net.width, net.ffn, net.n_heads, half, bulk)


def forward_launches(blocks: Tensor, net: Net, out: Tensor, workspace: Tensor) -> Iterator[Launch]:
    n = blocks.shape[0]
    chunk = _chunk(n, net.rows(blocks.shape[1]))
    buffers = _carve(workspace, _sizes(blocks[:chunk], net), net.layers)
    if buffers.bulk:
        yield from gained_launches(net, buffers.bulk)
    for start in range(0, n, chunk):
        some = blocks if chunk == n else blocks[start : start + chunk]
        plan = plan_of(some, net)
        yield from layer_launches(some, net, buffers, plan)
        yield from pool_launches(some, net, buffers, out if chunk == n else out[start : start + chunk], plan)


def gist_encode_triton(
    blocks: Tensor, *args: Any, out: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """The op's flat arguments (tensors in the order of its schema, level, n_heads, pool, rope_theta, target_rms).

    out: [N, G, E] in blocks' dtype, contiguous. workspace: uint8, contiguous, 16-byte aligned, at least
    `gist_encode_workspace` bytes. With both (and weights whose last dimension is contiguous) nothing is allocated, so
    that the call can be captured in a CUDA graph after a first one has compiled the kernels.
    Raises BackendError if either does not fit.
    """
    net = Net.of(args)
    shape = (blocks.shape[0], net.gists, blocks.shape[2])
    if out is None:
        out = torch.empty(shape, dtype=blocks.dtype, device=blocks.device)
    elif out.shape != shape or out.dtype != blocks.dtype or not out.is_contiguous():
        raise BackendError(f"out: expected contiguous {blocks.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    if blocks.shape[0] == 0:
        return out
    size = gist_encode_workspace(blocks, *net)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.uint8, device=blocks.device)
    elif workspace.dtype != torch.uint8 or workspace.numel() < size or not workspace.is_contiguous():
        raise BackendError(f"workspace: expected uint8 [{size}] or more, got {workspace.dtype} {list(workspace.shape)}")
    with torch.cuda.device_of(blocks):
        for launch in forward_launches(blocks, net, out, workspace):
            launch.run()
    return out


def compilations() -> Iterator[Compilation]:
    """What is launched for SmolLM2-135M and Llama-3-8B, one window to thousands. Left out is attention's backward over
    windows of more than 64 rows: it spills 64 bytes a thread on sm_80 (sm_90, sm_100: none)."""
    seen = set()
    for shape, blocks, net in _shapes():
        for launch in _all_launches(blocks, net):
            if launch.kernel is attention_backward_kernel and net.rows(blocks.shape[1]) > 64:
                continue
            one = launch.compilation(shape)
            one = replace(one, capabilities=(90,) if is_bulk(launch) else ())
            key = (one.kernel, *one.signature.items(), *one.constexprs.items(), one.num_warps, one.aligned)
            if key not in seen:
                seen.add(key)
                yield one


def _shapes() -> Iterator[tuple[str, Tensor, Net]]:
    from .cases import CASES, Case

    wanted = {f"{model}/N{n}" for model in ("SmolLM2-135M", "Llama-3-8B") for n in (1, 8, 64, 512)}
    both: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    cases = [(case, both) for case in CASES if case.name in wanted]
    cases += [(case, both[:1]) for case in CASES if case.name == "SmolLM2-135M/N4096"]
    # What `mc train gist` makes (width 256), narrow nets, the widest window.
    for width, n, block_size in ((256, 1, 32), (256, 512, 32), (128, 512, 32), (64, 512, 32), (512, 128, 128)):
        name = f"SmolLM2-135M, Eg {width}, K {block_size}/N{n}"
        cases.append((Case(name, n, block_size, 576, width, 2, width // 64, 3 * width), both[:1]))
    for case, dtypes in cases:
        for dtype in dtypes:
            weights = case.untrained().to("meta", dtype)
            blocks = torch.empty(case.blocks, case.block_size, case.embed_dim, dtype=dtype, device="meta")
            constants = (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms)
            yield f"{case.name}/{str(dtype).removeprefix('torch.')}", blocks, Net.of((*weights.tensors(), *constants))


def _all_launches(blocks: Tensor, net: Net) -> list[Launch]:
    from .triton_backward import backward

    out = torch.empty(blocks.shape[0], net.gists, blocks.shape[2], dtype=blocks.dtype, device="meta")
    workspace = torch.empty(gist_encode_workspace(blocks, *net), dtype=torch.uint8, device="meta")
    launches = list(forward_launches(blocks, net, out, workspace))
    backward(out, blocks, net, (blocks, *net.weights()), Arena(None), launches.append)
    return launches
