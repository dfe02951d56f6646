"""flash-attention 2: its decode and prefill kernels with its rotary kernel, and that kernel around a splice.

Its decode kernel rotates the query and the newest key but reads a cache of rotated keys. Two candidates show both
sides: `flash-attn rotate` does what `context_attention` does, in two kernels; `flash-attn`, for one query, does less.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mc_kernels.rope import apply_rope, phases

from ..workloads import Candidate, Workload
from .liger import kernel, splices_rotated

NAME = "flash-attn"


def missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if find_spec("flash_attn") else "package flash-attn is not installed"


def _rotary() -> Any:
    return kernel("flash_attn.layers.rotary", "apply_rotary_emb")


def _table(positions: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """cos, sin [n, D/2] in the dtype of the cache."""
    cos, sin = phases(positions, inputs["rope"].inv_freq_on(inputs["k"].device))
    return cos.to(inputs["k"].dtype), sin.to(inputs["k"].dtype)


class SegmentSplice:
    """Its rotary kernel reads and writes any strides: each segment is rotated out of the cache and copied back."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        plan, device = inputs["plan"], inputs["k"].device
        self.k, self.v = (inputs[x].squeeze(1).transpose(1, 2) for x in ("k", "v"))  # [R, S, H, D]
        self.k_new, self.v_new = (inputs[x].transpose(1, 2) for x in ("k_new", "v_new"))
        self.slots = plan.insert_slots.to(device)
        self.new = _table(self.slots, inputs)
        self.segments = [
            (slice(s, s + n), slice(d, d + n), _table(torch.full((n,), d - s, device=device), inputs))
            for s, d, n in plan.segments.tolist()
        ]

    def __call__(self) -> None:
        rotary = _rotary()
        # All reads come before the first write: a segment may land on the source of another.
        keys = [rotary(self.k[:, source], *table) for source, _, table in self.segments]
        values = [self.v[:, source].clone() for source, _, _ in self.segments]
        for (_, target, _), key, value in zip(self.segments, keys, values, strict=True):
            self.k[:, target], self.v[:, target] = key, value
        self.k.index_copy_(1, self.slots, rotary(self.k_new, *self.new))
        self.v.index_copy_(1, self.slots, self.v_new)


def _splice(workload: Workload) -> Candidate:
    def result(state: SegmentSplice, _: Any) -> Any:
        return workload.by_slot(state.k.transpose(1, 2), state.v.transpose(1, 2))  # type: ignore[attr-defined]

    note = "its rotary kernel out of place, a segment at a time, then copies"
    return Candidate(NAME, lambda state: state(), SegmentSplice, result, note)


def _sort(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [1, T, Hq, D], k and v [1, S, Hkv, D] in timeline order (its causal mask goes by rank), and their positions."""
    order = inputs["kv_pos"][0].argsort()
    k, v = (inputs[x].index_select(2, order).transpose(1, 2) for x in ("k", "v"))
    return inputs["q"].transpose(1, 2).contiguous(), k, v, inputs["kv_pos"][0][order]


def _prepare_rotate(inputs: dict[str, Any]) -> tuple[Any, ...]:
    q, k, v, positions = _sort(inputs)
    return q, k, v, _table(inputs["q_pos"][0], inputs), _table(positions, inputs)


def _run_prefill(state: tuple[Any, ...]) -> Tensor:
    q, k, v, q_table, k_table = state
    rotary = _rotary()
    return kernel("flash_attn", "flash_attn_func")(rotary(q, *q_table), rotary(k, *k_table), v, causal=True)


def _run_rotate_decode(state: tuple[Any, ...]) -> Tensor:
    q, k, v, q_table, k_table = state
    rotary = _rotary()
    # This entry point splits the keys over the device, which one query needs.
    return kernel("flash_attn", "flash_attn_with_kvcache")(rotary(q, *q_table), rotary(k, *k_table), v)


def _prepare_stored(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """A cache of rotated keys without the newest entry, which every call brings along, and rotates, anew."""
    q, k, v, positions = _sort(inputs)
    rotated = apply_rope(k.transpose(1, 2), positions, inputs["rope"]).transpose(1, 2)
    newest = [x[:, -1:].clone() for x in (k, v)]
    everywhere = torch.arange(k.shape[1], device=k.device)
    return q, rotated, v.clone(), *newest, *_table(everywhere, inputs), k.shape[1] - 1


def _run_stored(state: tuple[Any, ...]) -> Tensor:
    q, k, v, k_new, v_new, cos, sin, length = state
    return kernel("flash_attn", "flash_attn_with_kvcache")(
        q, k, v, k_new, v_new, rotary_cos=cos, rotary_sin=sin, cache_seqlens=length, rotary_interleaved=False
    )


def _back(_: Any, out: Tensor) -> Tensor:
    return out.transpose(1, 2)


def offers(workload: Workload) -> list[Candidate]:
    case = workload.case
    if workload.dtype == torch.float32:
        return []
    if splices_rotated(workload):
        return [_splice(workload)]
    if workload.op != "context_attention" or case.batch > 1 or case.features:
        return []
    rotate, note = f"{NAME} rotate", "rotates all keys first; they are sorted by position beforehand"
    if case.queries > 1:
        return [Candidate(rotate, _run_prefill, _prepare_rotate, _back, note)]
    return [
        Candidate(rotate, _run_rotate_decode, _prepare_rotate, _back, note),
        Candidate(NAME, _run_stored, _prepare_stored, _back, "does less: reads keys that are stored rotated"),
    ]
