"""`lens_score` in Triton: the launches of a forward, their block sizes, and the buffers between them.

Contract: `ref`'s formula; entries [N, E] and queries [Q, E] of one dtype, weights of one dtype, fp32, bf16 or fp16;
features fp32; any strides with a contiguous last dimension (weights without one are copied); `out` [N, 2] fp32. Sums are
fp32. Where entries and weights share a 16-bit dtype the absorbed vectors and the unnormalised softmax weights are
rounded to it, as the operands of a tensor core, and the head runs in TF32; otherwise every product is exact fp32
(`ieee`), which a GPU does without tensor cores. N = 0 gives an empty output. `out` may alias no input. Two calls give the same bits.

Launches (P = 1: 10), each a pass by itself; a CUDA graph is what makes them follow each other in a microsecond:
    project_queries, absorb
    products, weighted_sum        the read pass. Its result c [H Q, E] is 1 MB of fp32 at H Q = 64, E = 4096, four times
                                  the registers of an SM, and a program that owns a slice of E lacks the logits, which
                                  are sums over E: so the logits are one launch over the entries, the sums the next one, and
                                  the softmax is online over blocks in both. (A cluster of 8 SMs that exchanged logits
                                  would need one; Triton has no such exchange.)
    attended_values, linear, swiglu, linear, absorb
    score_entries                 everything else, fused

Floor at N = 8192, E = 4096, bf16: entries 67 MB a launch, weights 19 MB: 3 x 67 + 19 MB, 52 us at the 4.2 TB/s of an
H200, less what the 50 MB of L2 keep between launches. Each block of 64 entries reads the 0.5 MB of vectors again from L2, which
equals the entries' bytes: `products` and `score_entries` ask L2 for 134 MB. FLOPs: 13 G, 0.02 ms at a tenth of the matrix
rate, under the traffic. At E = 576 all of it sits in L2, and launches are the time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..triton_report import Compilation
from .cases import CASES, Case
from .triton_backward import backward_launches
from .triton_launch import Arena, Launch
from .triton_plan import forward_launches
from .weights import LensScoreWeights


def lens_score_workspace(*args: Tensor | int | None) -> int:
    """Bytes of the workspace of `lens_score_triton(*args)`; depends on shapes and dtypes only (meta tensors do)."""
    arena = Arena(None)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
    if meta[0].shape[0]:
        next(forward_launches(arena, meta[0], *meta))
    return arena.bytes


def lens_score_triton(
    *args: Tensor | int | None, out: Tensor | None = None, workspace: Tensor | None = None
) -> Tensor:
    """args: those of `ref.lens_score_ref`. Returns scores [N, 2] fp32.

    out: [N, 2] fp32, contiguous. workspace: uint8, contiguous, aligned to 256 bytes, `lens_score_workspace(*args)` bytes
    or more, in use until the launches are done. With both, and weights whose rows are contiguous, nothing is allocated
    and the call can be captured in a CUDA graph. Launches on the current stream.
    """
    entries = args[0]
    assert isinstance(entries, Tensor)
    if out is None:
        out = entries.new_empty(entries.shape[0], 2, dtype=torch.float32)
    if entries.shape[0] == 0:
        return out
    if workspace is None:
        workspace = entries.new_empty(lens_score_workspace(*args), dtype=torch.uint8)
    for launch in forward_launches(Arena(workspace), out, *args):
        launch.run()
    return out


def _arguments(case: Case, data: torch.dtype, weights: LensScoreWeights) -> list[Tensor | int | None]:
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
    """What `CASES` of SmolLM2-135M and Llama-3-8B launch in bf16; at 8k entries also in fp32 and with fp32 weights beside
    bf16 entries."""
    bf16, fp32 = torch.bfloat16, torch.float32
    seen = set()
    for case in (c for c in CASES if c.name.startswith(("SmolLM2-135M", "Llama-3-8B"))):
        for data, weight in [(bf16, bf16), *([(fp32, fp32), (bf16, fp32)] if case.entries == 8192 else [])]:
            weights = _weights(case, weight)
            args = _arguments(case, data, weights)
            out = torch.empty(case.entries, 2, device="meta")
            forward = forward_launches(Arena(None), out, *args)
            entries, sizes = args[0], (case.queries, case.n_direct, case.n_heads, case.n_passes)
            assert isinstance(entries, Tensor)
            kinds = " and ".join(sorted({str(x).removeprefix("torch.") for x in (data, weight)}))
            for launch in (*forward, *backward_launches(entries, weights.w_in, *sizes)):
                one = launch.compilation(f"{case.name.split('/')[0]}, {kinds}")
                if repr(one) not in seen:
                    seen.add(repr(one))
                    yield one
