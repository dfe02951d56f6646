"""FlashInfer: attention of one request that rotates keys while it reads them, and its rope kernel around a splice.

Its attention takes an entry's rank for its position (no positions per entry), so keys and values are sorted by position
beforehand, untimed. Kernels are compiled when they are first called.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..workloads import Candidate, Workload
from .liger import kernel, splice_with, splices_rotated

NAME = "flashinfer"
SLOW_TO_START = True
NOTE = "keys sorted by position beforehand"


def missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if find_spec("flashinfer") else "package flashinfer-python is not installed"


def _table(cos: Tensor, sin: Tensor) -> Tensor:
    """[n, D] fp32: cosines, then sines."""
    return torch.cat((cos, sin), dim=-1)


def _turn(x: Tensor, state: tuple[Tensor, Tensor]) -> Tensor:
    """The kernel rotates queries and keys of the same number of tokens: here one half of the rows each."""
    table, index = state
    d = x.shape[-1]
    q, k = (half.view(half.shape[0] * half.shape[1], -1) for half in x.chunk(2))
    kernel("flashinfer.rope", "apply_rope_with_cos_sin_cache_inplace")(index, q, k, d, table)
    return x


def _splice(workload: Workload) -> Candidate:
    half = workload.case.rows // 2

    def table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel's cache of phases with one line a moved entry, and the line of each token of half the rows."""
        lines = torch.arange(cos.shape[0], dtype=torch.int32, device=cos.device)
        return _table(cos, sin), lines.repeat(half)

    return splice_with(workload, NAME, table, _turn)


def _sort(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, Hq, D], k and v [Hkv, S, D] in timeline order."""
    order = inputs["kv_pos"][0].argsort()
    k, v = (inputs[x][0].index_select(1, order) for x in ("k", "v"))
    return inputs["q"][0].transpose(0, 1).contiguous(), k, v


def _attention(workload: Workload) -> list[Candidate]:
    case = workload.case
    rope: dict[str, Any] = {"kv_layout": "HND", "pos_encoding_mode": "ROPE_LLAMA", "rope_theta": case.theta}

    def back(_: Any, out: Tensor) -> Tensor:
        return out.transpose(0, 1)[None]  # [T, Hq, D] -> [1, Hq, T, D]

    def prefill(state: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return kernel("flashinfer", "single_prefill_with_kv_cache")(*state, causal=True, **rope)

    def decode(state: tuple[Tensor, Tensor, Tensor], tensor_cores: bool) -> Tensor:
        q, k, v = state
        run = kernel("flashinfer", "single_decode_with_kv_cache")
        return run(q[0], k, v, use_tensor_cores=tensor_cores, **rope)[None]

    if case.queries > 1:
        return [Candidate(NAME, prefill, _sort, back, NOTE)]
    return [
        Candidate(NAME, lambda state: decode(state, False), _sort, back, NOTE),
        Candidate(f"{NAME} tensor cores", lambda state: decode(state, True), _sort, back, NOTE),
    ]


def offers(workload: Workload) -> list[Candidate]:
    if workload.dtype == torch.float32:
        return []
    if splices_rotated(workload) and workload.case.rows % 2 == 0:
        return [_splice(workload)]
    if workload.op == "context_attention" and workload.case.batch == 1 and not workload.case.features:
        return _attention(workload)
    return []
