"""`lens_score` in Triton: the launches of a forward, their block sizes, and the buffers between them.

Contract: `ref`'s formula; entries [N, E] and queries [Q, E] of one dtype, weights of one dtype, fp32, bf16 or fp16;
features fp32; any strides with a contiguous last dimension (weights without one are copied); `out` [N, 2] fp32 aliases
no input. Sums are fp32. Where entries and weights share a 16-bit dtype, the absorbed vectors and the unnormalised
softmax weights are rounded to it as operands of the tensor cores, and the queries' side and the head run in TF32;
otherwise every product is exact fp32, which a GPU does without tensor cores (fp32 weights beside bf16 entries too).
N = 0 gives an empty output. Two calls give the same bits.

Launches, 5 + 9 P; a CUDA graph makes them follow each other within a microsecond or two, without one Python's launches
(10 to 20 us each) are the time:
    project_queries, collect
    turn, absorb                          norm, read_q; read_k
    products, weighted_sum                the read pass. Its sums [H Q, E] are 1 MB of fp32 at H Q = 64, E = 4096, four
                                          times the registers of an SM, while a program that owns some columns lacks the
                                          logits, which are sums over E. So logits are one launch over the entries and
                                          sums the next, the softmax by blocks. One launch would need SMs that
                                          exchange logits while they hold a block: a cluster, which Triton has not, or a
                                          barrier over the grid, which hangs unless all programs are resident at once. A
                                          reduction by the last program to arrive is no way round it: it would reduce 1
                                          MB of sums for each block of 64 entries, which are 0.5 MB. Sums of the splits
                                          of N (8 at E = 4096) are added up by `attended_values`.
    attended_values, collect, linear, swiglu, linear
    turn, absorb, score_entries               the score pass is one launch: match, direct rows, head, legality

Floor at N = 8192, E = 4096, bf16: 67 MB of entries three times and 19 MB of weights are 52 us at the 4.2 TB/s of an
H200, less what its 50 MB of L2 keep from launch to launch; from L2, `products` and `score_entries` ask for 134 MB each,
since a block of 64 entries reads the 0.5 MB of vectors again. FLOPs: 17 G (4 of them the squares of the entries, which
tensor cores sum), 17 us at the dense rate, beside the traffic.
The launches on the queries' side are 2 to 5 us each. At E = 576 all of it sits in L2, and launches are the time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..triton_arena import Arena
from ..triton_report import Compilation
from .cases import CASES, Case
from .triton_backward import backward_launches
from .triton_plan import forward_launches
from .weights import LensScoreWeights


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(tensors: tuple[tuple[torch.Size, torch.dtype] | None, ...], n_heads: int) -> int:
    arena = Arena(None)
    meta = [None if x is None else torch.empty(x[0], dtype=x[1], device="meta") for x in tensors]
    entries = meta[0]
    if entries is not None and entries.shape[0]:
        next(forward_launches(arena, entries, *meta, n_heads))
    return arena.bytes


def lens_score_workspace(*args: Any) -> int:
    """Bytes of the workspace of `lens_score_triton(*args)`; depends on shapes and dtypes only (meta tensors do)."""
    *tensors, n_heads = args
    return _workspace_bytes(tuple(None if x is None else (x.shape, x.dtype) for x in tensors), n_heads)


def lens_score_triton(*args: Any, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """args: those of `ref.lens_score_ref`. Returns scores [N, 2] fp32.

    out: [N, 2] fp32, contiguous. workspace: uint8, contiguous, aligned to 256 bytes, `lens_score_workspace(*args)`
    bytes or more, in use until the launches are done. With both, and weights whose rows are contiguous, nothing is
    allocated and the call can be captured in a CUDA graph. Launches on the current stream.
    """
    entries: Tensor = args[0]
    if out is None:
        out = entries.new_empty(entries.shape[0], 2, dtype=torch.float32)
    if entries.shape[0] == 0:
        return out
    if workspace is None:
        workspace = entries.new_empty(lens_score_workspace(*args), dtype=torch.uint8)
    with torch.cuda.device_of(entries):
        for launch in forward_launches(Arena(workspace), out, *args):
            launch.run()
    return out


def _arguments(case: Case, data: torch.dtype, weights: LensScoreWeights) -> list[Any]:
    """A call of this shape without memory."""
    with torch.device("meta"):
        entries, queries = (torch.empty(count, case.embed_dim, dtype=data) for count in (case.entries, case.queries))
        features, legal = torch.empty(case.entries, case.features), torch.empty(case.entries, 2, dtype=torch.bool)
    return [entries, features, queries, *weights.tensors(), legal, case.n_heads]


def _weights(case: Case, dtype: torch.dtype) -> LensScoreWeights:
    with torch.device("meta"):
        return LensScoreWeights.init(
            case.embed_dim, case.features, width=case.width, n_heads=case.n_heads, n_passes=case.n_passes,
            ffn_dim=case.ffn_dim, head_value_dim=case.head_value_dim, n_direct=case.n_direct, head_dim=case.head_dim,
            dtype=dtype,
        )  # fmt: skip


def compilations() -> Iterator[Compilation]:
    """What `CASES` of SmolLM2-135M and Llama-3-8B launch in bf16; one also in fp32, and with fp32 weights beside bf16
    entries."""
    bf16, fp32 = torch.bfloat16, torch.float32
    seen = set()
    for case in (c for c in CASES if c.name.startswith(("SmolLM2-135M", "Llama-3-8B"))):
        exact = [(fp32, fp32), (bf16, fp32)] if case.name == "Llama-3-8B/N8k" else []
        for data, weight in [(bf16, bf16), *exact]:
            weights = _weights(case, weight)
            args = _arguments(case, data, weights)
            out = torch.empty(case.entries, 2, device="meta")
            forward = forward_launches(Arena(None), out, *args)
            sizes = (case.queries, case.n_direct, case.n_heads, case.n_passes)
            kinds = " and ".join(sorted({str(x).removeprefix("torch.") for x in (data, weight)}))
            for launch in (*forward, *backward_launches(args[0], weights.w_in, *sizes)):
                one = launch.compilation(f"{case.name.split('/')[0]}, {kinds}")
                if repr(one) not in seen:
                    seen.add(repr(one))
                    yield one
