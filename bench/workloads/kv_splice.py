"""`kv_splice_`: the plan is made beforehand; the call, its checks and its host code are timed.

Repeated splices of one plan work on a cache of one length, so that every call does the same work. Checked on up to
CHECKED_ROWS rows from the first to the last: all their entries, in the case's own size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mc_kernels import kv_splice_
from mc_kernels.rope import RopeSpec, phases, rotate

from .base import Check, Workload, error_rule

Args = dict[str, Any]
CHECKED_ROWS = 5


def plain_rotate(keys: Tensor, positions: Tensor, rope: RopeSpec) -> Tensor:
    """keys [..., n, D] rotated by positions [n] as model code does it: phases and products in the storage dtype."""
    cos, sin = phases(positions.to(keys.device), rope.inv_freq_on(keys.device))
    return rotate(keys, cos.to(keys.dtype), sin.to(keys.dtype), rope.interleaved)


def plain_splice(k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, plan: Any, rope: RopeSpec | None) -> None:
    """In place with slices: what moves is copied out, rotated by its shift and written back; packed positions."""
    if rope is not None and plan.discipline != "ordered":
        raise ValueError("plain_splice: rotated keys in slots are no benchmark case")
    segments = plan.segments.tolist()
    moved_k = [k[..., s : s + n, :].clone() for s, _, n in segments]
    moved_v = [v[..., s : s + n, :].clone() for s, _, n in segments]
    if rope is not None:
        moved_k = [plain_rotate(x, torch.tensor([d - s]), rope) for x, (s, d, _) in zip(moved_k, segments, strict=True)]
        k_new = plain_rotate(k_new, plan.insert_slots, rope)
    for (_, d, n), x, y in zip(segments, moved_k, moved_v, strict=True):
        k[..., d : d + n, :], v[..., d : d + n, :] = x, y
    slots = plan.insert_slots.to(k.device)
    k.index_copy_(-2, slots, k_new)
    v.index_copy_(-2, slots, v_new)


class KvSplice(Workload):
    op = "kv_splice_"
    limit = "copy"

    @staticmethod
    def touched(case: Any, dtype: torch.dtype) -> int:
        return int(case.cache_bytes(dtype))

    def ours(self, inputs: Args, backend: str) -> None:
        kv_splice_(**inputs, backend=backend)

    def result(self, inputs: Args, out: None) -> tuple[Tensor, Tensor]:
        return self.by_slot(inputs["k"], inputs["v"])

    def by_slot(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What a candidate's `result` returns: k, v [R, Hkv, >= new_length, D], cut to the slots in use."""
        n = self.case.plan.new_length
        return k.flatten(0, -4)[..., :n, :], v.flatten(0, -4)[..., :n, :]

    def plain(self, inputs: Args) -> None:
        k, v = inputs["k"].squeeze(1), inputs["v"].squeeze(1)
        plain_splice(k, v, inputs["k_new"], inputs["v_new"], inputs["plan"], inputs["rope"])

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        plan, rope = inputs["plan"], inputs["rope"]
        spread = torch.linspace(0, self.case.rows - 1, min(CHECKED_ROWS, self.case.rows))
        rows = spread.round().long().to(self.device)
        # A second splice by one plan may find everything in its place: what ran before must not make this one right.
        at = rows // self.case.batch, rows % self.case.batch
        for x in (inputs["k"], inputs["v"]):
            x[at] = torch.cat((x[at][..., : plan.length, :].roll(1, dims=-2), x[at][..., plan.length :, :]), dim=-2)

        def sample(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            k, v = (inputs[x][at].to(dtype) for x in ("k", "v"))
            return k, v, inputs["k_new"][rows].to(dtype), inputs["v_new"][rows].to(dtype)

        exact, plain = sample(torch.float64), sample(self.dtype)
        kv_splice_(*exact, plan, rope=rope, backend="ref")
        plain_splice(*plain, plan=plan, rope=rope)
        n = plan.new_length

        def judge(out: tuple[Tensor, Tensor]) -> Check:
            got = [x[rows][:, :, :n] for x in out]
            return error_rule(got, [x[..., :n, :] for x in exact[:2]], [x[..., :n, :] for x in plain[:2]])

        return judge
