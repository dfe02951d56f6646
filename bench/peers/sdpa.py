"""torch's fused attention, `scaled_dot_product_attention`, on keys that are rotated in the storage dtype.

The query heads that share a KV head are rows of one product. With `enable_gqa`, or with repeated heads, the CPU kernel
reads every key once per query head: at one query that takes four times as long.
Phases, mask and the buffer of the rotated keys serve all layers of a forward, so they are made beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.rope import RopeSpec, phases

from ..workloads import Candidate, Workload
from ..workloads.context_attention import visible

NAME = "SDPA"
# More keys than this are rotated and read head by head: what was just written is still in the cache.
WHOLE_BYTES = 2 << 20


@dataclass(frozen=True)
class State:
    """q [B, Hq, T, D], k and v [B, Hkv, S, D]; phases of q and k; mask [B, 1, Hq/Hkv * T, S] to be added, or None;
    heads: KV heads at a time; buffer [B, heads, S, D]: their rotated keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_phases: tuple[Tensor, Tensor]
    k_phases: tuple[Tensor, Tensor]
    mask: Tensor | None
    heads: int
    buffer: Tensor


def _phases(positions: Tensor, rope: RopeSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos [B, 1, n, D] and sin [B, 1, n, D/2] in the storage dtype."""
    cos, sin = (x[:, None].to(dtype) for x in phases(positions, rope.inv_freq_on(positions.device)))
    return torch.cat((cos, cos), dim=-1), sin


def _rotate(x: Tensor, phases: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """x [..., D] rotated, its halves paired, without temporaries."""
    cos, sin = phases
    half = sin.shape[-1]
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin, value=-1)
    out[..., half:].addcmul_(x[..., :half], sin)
    return out


def prepare(inputs: dict[str, Any]) -> State:
    q, k, rope = inputs["q"], inputs["k"], inputs["rope"]
    seen, groups = visible(inputs), q.shape[1] // k.shape[1]
    mask = None
    if seen is not None:  # a boolean mask would be converted in every call
        mask = torch.zeros_like(seen, dtype=q.dtype).masked_fill_(~seen, float("-inf")).repeat(1, 1, groups, 1)
    whole = k.device.type != "cpu" or k.nbytes <= WHOLE_BYTES
    heads = k.shape[1] if whole else 1
    return State(
        q, k, inputs["v"], _phases(inputs["q_pos"], rope, q.dtype), _phases(inputs["kv_pos"], rope, q.dtype), mask,
        heads, torch.empty_like(k[:, :heads], memory_format=torch.contiguous_format),
    )  # fmt: skip


def prepare_rotated(inputs: dict[str, Any]) -> State:
    state = prepare(inputs)
    rotated = _rotate(state.k, state.k_phases, torch.empty_like(state.k, memory_format=torch.contiguous_format))
    return replace(state, k=rotated)


def _rows(s: State) -> Tensor:
    """The rotated queries [B, Hkv, Hq/Hkv * T, D]."""
    q = _rotate(s.q, s.q_phases, torch.empty_like(s.q))
    return q.unflatten(1, (s.k.shape[1], -1)).flatten(2, 3)


def attend(s: State) -> Tensor:
    rows, outputs = _rows(s), []
    for first in range(0, s.k.shape[1], s.heads):
        some = slice(first, first + s.heads)
        keys = _rotate(s.k[:, some], s.k_phases, s.buffer)
        outputs.append(F.scaled_dot_product_attention(rows[:, some], keys, s.v[:, some], attn_mask=s.mask))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).view(s.q.shape)


def attend_rotated(s: State) -> Tensor:
    return F.scaled_dot_product_attention(_rows(s), s.k, s.v, attn_mask=s.mask).view(s.q.shape)


def missing(device: torch.device) -> str | None:
    return None


def offers(workload: Workload) -> list[Candidate]:
    if workload.op != "context_attention" or workload.case.features:
        return []
    return [
        Candidate(NAME, attend, prepare, note="phases and mask made beforehand"),
        Candidate(
            f"{NAME}, keys rotated before", attend_rotated, prepare_rotated,
            note="does less: keys are rotated beforehand", same_work=False,
        ),
    ]  # fmt: skip
