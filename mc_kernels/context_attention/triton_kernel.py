"""`context_attention` in Triton: host code. Contract (formula, shapes, what empty input gives): ref.py.

    attend_kernel     a block of queries (the G heads of a KV head packed into its rows) over a range of slots
    combine_kernel    the ranges of one row joined, where slots are split over programs
    rotate_kernel     many queries only: q and k rotated once, into the workspace
    mass_*_kernel     mass, once a row's greatest logit and the sum over it are known
The backward's host code is in triton_backward.py. Everything is deterministic; nothing reads a value back.

Decode (rows T G <= 64) streams keys and values once. Floor: bytes over bandwidth. Llama-3-8B at 32k slots: 134 MB a
layer, 40 us at 3.35 TB/s (H100), 28 us at 4.8 TB/s (H200); at 2k 2.5 us, less than the launches. Slots are split so
that programs fill four blocks on each multiprocessor in one wave: a tile is a chain of products, sums over warps and
barriers, during which a block alone leaves the multiprocessor idle half of the time (two blocks took 50 us of 32k slots
on an H200 whose bytes take 35). Each has two tiles of keys and values in flight.
Of a short context the ends count: measured on an H100, 8k slots took 8 us more than their share of 32k's. So tiles are
small, since what the last one costs after its bytes have come is hidden by nothing, and the ranges of a row are joined
with all loads under way at once. Asking for a program's slots (to L2) before it looks at its queries cost 2 us at 8k
slots, 6 at 32k.
Keys are rotated *while they are read*, phases computed in registers: some 17 instructions a pair of dimensions in 16
bits (31 in fp32), 9 of them for the phase, its sine and cosine. At D = 128 that is 9 cycles of a multiprocessor for an
entry of one KV head, of 19 in all, and 8 of the special function unit beside them, where its 512 bytes take 34 cycles
to arrive (H100: 53 at the rate measured). A table of cosines and sines would cost 4 D bytes of traffic an entry, 12.5 %
of keys and values with 8 KV heads and 33 % with 3, and a launch to fill it: more than the 6 % that rotation may cost.

Prefill (more rows) is bound by the matrix rate: 4 D FLOPs a visible pair and head over 989 TFLOP/s; 512 queries of
Llama-3-8B at 32k slots are 275 GFLOP, 0.28 ms. Rotating a tile of keys takes about as long as its products with 128
rows, and every block of rows reads it, so here the rotation is a pass of its own: 3 bytes moved for each byte of k,
0.06 ms at 32k. It also sorts pairs into first and second members: partial and interleaved rotations are gone before the
loop. Blocks of the last queries start first, and where queries span an eighth of the slots or more, the future is
skipped after a scan of the positions. What stays between this and the matrix rate: positions are compared pair by pair
in int64, since slots lie in any order.

fp32 products are exact (no TF32), hence not on tensor cores: correct, not fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..triton_report import Compilation
from .cases import MODELS
from .triton_backward import context_attention_backward_triton
from .triton_forward import attend_kernel, combine_kernel
from .triton_launch import (
    MOST_SPLITS,
    Heads,
    Scratch,
    Tiles,
    carve,
    check_out,
    forward_tiles,
    launch,
    recording,
    scratch_bytes,
    strides,
    turning,
)
from .triton_mass import mass_kernel, mass_of_logits_kernel
from .triton_rotate import rotated


def _scratch(q: Tensor, k: Tensor, heads: Heads, tiles: Tiles, return_mass: bool) -> Scratch:
    (b, hq, t, d), (hkv, s) = q.shape, k.shape[1:3]
    found: Scratch = {}
    if heads.half_rot and not tiles.rotate_on_read:
        found["q"] = ((b, hq, t, heads.padded), q.dtype)
        found["k"] = ((b, hkv, s, heads.padded), q.dtype)
    if tiles.splits > 1:
        found["partial_out"] = ((tiles.splits, b, hq, t, d), torch.float32)
        found["tops"] = ((tiles.splits, b, hq, t), torch.float32)
        found["totals"] = ((tiles.splits, b, hq, t), torch.float32)
    if return_mass:
        found["row_top"] = ((b, hq, t), torch.float32)
        found["row_total"] = ((b, hq, t), torch.float32)
    if return_mass and tiles.rotate_on_read:
        found["logits"] = ((b, hq, t, s), torch.float32)
    return found


def context_attention_workspace(q: Tensor, k: Tensor, inv_freq: Tensor | None, return_mass: bool) -> int:
    """Bytes of workspace that `context_attention_triton` needs for these (only shapes, dtype and device matter)."""
    if q.numel() == 0 or k.numel() == 0:
        return 0
    heads = Heads.of(q, k, inv_freq, False)
    return scratch_bytes(_scratch(q, k, heads, forward_tiles(q, k, heads, return_mass), return_mass))


def context_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: None = None, v_scale: None = None, *, out: tuple[Tensor, Tensor, Tensor] | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ref.context_attention_ref`. fp32, bf16 or fp16, D <= 256; not of fp8 caches, so without scales.

    out: (out [B, Hq, T, D] of q's dtype, last dimension contiguous; lse [B, Hq, T] and mass [B, S] ([0] unless asked)
        fp32, contiguous), overwritten; they alias nothing else. workspace: uint8, `context_attention_workspace` bytes.
        Given both, and `inv_freq` contiguous, nothing is allocated: the launches can be captured in a CUDA graph.
    """
    b, hq, t, d = q.shape
    hkv, s = k.shape[1:3]
    mass_shape = (b, s) if return_mass else (0,)
    if out is None:
        out = (
            torch.empty((b, hq, t, d), dtype=q.dtype, device=q.device),
            torch.empty((b, hq, t), dtype=torch.float32, device=q.device),
            torch.empty(mass_shape, dtype=torch.float32, device=q.device),
        )
    result, lse, mass = out
    check_out("out", result, q, contiguous=False)
    check_out("lse", lse, ((b, hq, t), torch.float32), contiguous=True)
    check_out("mass", mass, (mass_shape, torch.float32), contiguous=True)
    if q.numel() == 0 or s == 0:
        result.zero_(), lse.fill_(float("-inf")), mass.zero_()
        return out
    scale = scale if inv_freq is None else scale * attention_scaling**2
    inv_freq = turning(inv_freq)
    heads = Heads.of(q, k, inv_freq, interleaved)
    extras = return_mass or sigma is not None or kv_bias is not None
    tiles = forward_tiles(q, k, heads, extras)
    scratch = carve(_scratch(q, k, heads, tiles, return_mass), workspace, q.device)

    with torch.cuda.device_of(q):
        if inv_freq is not None and not tiles.rotate_on_read:
            q = rotated(q, q_pos, inv_freq, None, heads, scratch["q"])
            k = rotated(k, kv_pos, inv_freq, sigma, heads, scratch["k"])
            inv_freq, sigma = None, None
        half = heads.padded // 2
        turns = inv_freq is not None
        common = {
            "q_pos": q_pos, "kv_pos": kv_pos, "kv_bias": kv_bias,
            **strides(q=(q, "bht"), k=(k, "bhs"), q_pos=(q_pos, "bt"), kv_pos=(kv_pos, "bs"), bias=(kv_bias, "bs")),
            "kv_heads": hkv, "T": t, "S": s, "scale": scale,
        }  # fmt: skip
        of_rows = {"row_top": scratch.get("row_top"), "row_total": scratch.get("row_total")}
        of_splits = {
            "tops": scratch.get("tops", of_rows["row_top"]), "totals": scratch.get("totals", of_rows["row_total"]),
        }  # fmt: skip
        args = {
            **common, "q": q, "k": k, "v": v, "inv_freq": inv_freq, "sigma": sigma, "out": result, "lse": lse,
            "logits": scratch.get("logits"), "partial_out": scratch.get("partial_out"), **of_splits,
            **strides(v=(v, "bhs"), out=(result, "bht"), sigma=(sigma, "bs")),
            "all_rows": b * hq * t, "splits": tiles.splits, "chunk": tiles.chunk,
        }  # fmt: skip
        constants = {
            "G": heads.group, "D": d, "D_PAD": heads.padded, "QK_D": q.shape[-1], "HALF": half,
            "HALF_ROT": heads.half_rot if turns else 0, "INTERLEAVED": turns and heads.interleaved, "ROTATE": turns,
            "SKIP_FUTURE": tiles.skip_future, "BLOCK_M": tiles.block_m, "BLOCK_S": tiles.block_s,
        }  # fmt: skip
        programs = b * hkv * tiles.splits * math.ceil(heads.group * t / tiles.block_m)
        launch(attend_kernel, programs, args, constants, tiles.num_warps, tiles.num_stages, tiles.registers)
        if tiles.splits > 1:
            args = {
                "partial_out": scratch["partial_out"], **of_splits, "out": result, "lse": lse, **of_rows,
                **strides(out=(result, "bht")), "heads": hq, "T": t, "splits": tiles.splits,
            }  # fmt: skip
            pad = next(x for x in (16, 64, MOST_SPLITS) if x >= tiles.splits)  # few values: each is compiled anew
            constants = {"D": d, "D_PAD": heads.padded, "SPLITS_PAD": pad}
            warps = min(8, max(1, pad * heads.padded // 2048))  # of 64 elements a thread, which are in flight together
            launch(combine_kernel, b * hq * t, args, constants, warps)
        if return_mass and "logits" in scratch:
            args = {"logits": scratch["logits"], **of_rows, "mass": mass, "rows": hq * t, "S": s}
            launch(mass_of_logits_kernel, b * math.ceil(s / 128), args, {"BLOCK_R": 16, "BLOCK_S": 128})
        elif return_mass:
            block_m, block_s, warps = (32, 64, 8 if heads.padded > 64 else 4) if heads.padded <= 128 else (32, 32, 4)
            if q.dtype == torch.float32:
                block_m, block_s, warps = 16, 32, 4
            args = {**common, "q": q, "k": k, **of_rows, "mass": mass}
            constants = {
                "G": heads.group, "QK_D": q.shape[-1], "HALF": half, "BLOCK_M": block_m, "BLOCK_S": block_s,
            }  # fmt: skip
            launch(mass_kernel, b * math.ceil(s / block_s), args, constants, warps)
    return out


# Of `compilations`: queries, slots, with sigma, bias and mass, dtypes. 512 queries span an eighth of 2k slots and more.
_COMPILED: list[tuple[int, int, bool, tuple[torch.dtype, ...]]] = [
    (1, 2048, False, (torch.bfloat16,)),
    (1, 32768, True, (torch.bfloat16, torch.float32)),
    (16, 8192, False, (torch.bfloat16,)),
    (512, 8192, False, (torch.bfloat16,)),
    (512, 2048, True, (torch.bfloat16, torch.float32)),
]


def compilations() -> Iterable[Compilation]:
    """What is launched for the models' shapes: decode steps, 16 queries, a prefill chunk, and a training step (512
    queries, 2k slots) with its backward. Gemma's heads are the widest that the kernels take; left out for them are few
    queries in 16 bits, which spill 56 to 72 bytes a thread on sm_90 and sm_100 in every configuration tried (blocks of
    16 to 64 slots, 4 and 8 warps, 1 to 3 stages; sm_80: none), and a pass that rotates the keys would double the
    bytes."""
    shapes = {model: MODELS[model][:3] for model in ("SmolLM2-135M", "Llama-3-8B")} | {"Gemma-2-9B": (16, 8, 256)}
    for model, (hq, hkv, d) in shapes.items():
        found: dict[object, Compilation] = {}
        for t, s, extras, dtypes in _COMPILED:
            for dtype in dtypes:
                if d > 128 and t <= 16 and dtype != torch.float32:
                    continue
                q, out = (torch.empty(1, hq, t, d, dtype=dtype, device="meta") for _ in range(2))
                k, v = (torch.empty(1, hkv, s, d, dtype=dtype, device="meta") for _ in range(2))
                q_pos = torch.empty(1, t, dtype=torch.int64, device="meta")
                kv_pos = torch.empty(1, s, dtype=torch.int64, device="meta")
                inv_freq, slot_values = torch.empty(d // 2, device="meta"), torch.empty(1, s, device="meta")
                spread, bias = (slot_values, slot_values) if extras else (None, None)
                rope = (inv_freq, False, 1.0, spread, bias, d**-0.5)
                with recording(f"{model}, {t} x {s}, {str(dtype).removeprefix('torch.')}") as launches:
                    lse = context_attention_triton(q, k, v, q_pos, kv_pos, *rope, extras)[1]
                    if t > 16 and extras:
                        context_attention_backward_triton(out, q, k, v, q_pos, kv_pos, *rope, out, lse)
                for one in launches:
                    what = (one.kernel, tuple(one.signature.items()), tuple(one.constexprs.items()), one.num_warps)
                    found.setdefault(what, one)
        yield from found.values()
