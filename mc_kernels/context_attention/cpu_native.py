"""`context_attention` on a CPU in C++: csrc/context_attention, for few queries cpu.cpp, for many tiles.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native

# Query tokens up to which the library's portable C++ beats torch's matrix products. Its code for x86 does, whatever
# their number, by measurement (bench/README.md, "Prefill attention").
MOST_PORTABLE_QUERIES = 64


def serves(queries: int) -> bool:
    """Whether this is the faster of the two for so many query tokens: the library is there, and its products are."""
    if native.available() is not None:
        return False
    return queries <= MOST_PORTABLE_QUERIES or native.library().cpu_isa() != "scalar"


def context_attention_native(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ref.context_attention_ref`. Sums are fp32, whatever the inputs; the contract is in mc_kernels.h."""
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=torch.float32)
    mass = torch.empty((k.shape[0], k.shape[2]) if return_mass else (0,), dtype=torch.float32)
    # Held in names: the library gets addresses.
    q_at, kv_at = native.array(q_pos, torch.int64), native.array(kv_pos, torch.int64)
    spread, bias, freq = (
        native.array(x, dtype)
        for x, dtype in ((sigma, torch.float32), (kv_bias, torch.float32), (inv_freq, torch.float64))
    )
    native.library().context_attention(
        q,
        k,
        v,
        native.address(q_at),
        native.address(kv_at),
        native.address(freq),
        0 if freq is None else freq.shape[0],
        interleaved,
        attention_scaling,
        native.address(spread),
        native.address(bias),
        scale,
        out,
        native.address(lse),
        native.address(mass),
        torch.get_num_threads(),
    )
    return out, lse, mass
