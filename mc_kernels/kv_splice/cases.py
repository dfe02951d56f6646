"""Cases of `kv_splice_`: inputs, minimal traffic and FLOPs. Tests use `SMALL`, benchmarks `CASES`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..rope import RopeSpec, apply_rope
from ..splicing import Edit
from .plan import SplicePlan

# layers, KV heads, head dimension, rope theta
MODELS = {
    "SmolLM2-135M": (30, 3, 64, 100_000.0),
    "Llama-3.2-1B": (16, 8, 64, 500_000.0),
    "Llama-3-8B": (32, 8, 128, 500_000.0),
}


@dataclass(frozen=True)
class Case:
    """A splice of `edits` evenly spread edits on a cache of `length` entries.

    kind: "collapse" (each edit replaces `span` entries by one), "expand" (one by `span`), or "mixed" (alternating, the
        length of the result is that before for an even number of edits).
    rope: keys are stored rotated and are re-rotated (packed positions).
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    length: int
    edits: int = 1
    kind: str = "collapse"
    discipline: str = "ordered"
    rope: bool = True
    theta: float = 10_000.0
    batch: int = 1
    span: int = 32

    @cached_property
    def plan(self) -> SplicePlan:
        """The plan; `length` + edits * (span - 1) slots are enough for every kind."""
        step = self.length // (self.edits + 1)
        collapse = {"collapse": [True], "expand": [False], "mixed": [True, False]}[self.kind]
        list_of = []
        for i in range(self.edits):
            remove, insert = (self.span, 1) if collapse[i % len(collapse)] else (1, self.span)
            list_of.append(Edit((i + 1) * step, remove, insert))
        return SplicePlan.from_edits(self.length, list_of, capacity=self.capacity, discipline=self.discipline)

    @property
    def capacity(self) -> int:
        return self.length + self.edits * (self.span - 1)

    @property
    def rows(self) -> int:
        return self.layers * self.batch

    def cache_bytes(self, dtype: torch.dtype) -> int:
        """Size of the cache that `make` allocates."""
        return 2 * self.rows * self.kv_heads * self.capacity * self.head_dim * dtype.itemsize

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `kv_splice_`: k and v are views of one cache [L, 2, B, Hkv, S, D]; unused slots hold NaN."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)

        size = (self.layers, 2, self.batch, self.kv_heads, self.capacity, self.head_dim)
        cache = torch.full(size, float("nan"), dtype=dtype, device=device)
        rope = RopeSpec.from_theta(self.theta, self.head_dim) if self.rope else None
        positions = torch.arange(self.length, device=device)
        for layer in range(self.layers):
            cache[layer, ..., : self.length, :] = normal(2, self.batch, self.kv_heads, self.length, self.head_dim)
            if rope is not None:
                keys = cache[layer, 0, ..., : self.length, :]
                keys.copy_(apply_rope(keys, positions, rope))
        fresh = (self.rows, self.kv_heads, self.plan.n_insert, self.head_dim)
        return {
            "k": cache[:, 0], "v": cache[:, 1], "k_new": normal(*fresh), "v_new": normal(*fresh),
            "plan": self.plan, "rope": rope,
        }  # fmt: skip

    def _entries(self) -> tuple[int, int, int]:
        """Entries that move, entries whose key is rotated in its place, entries that are inserted."""
        plan = self.plan
        if not self.rope or self.discipline == "ordered":
            return plan.moves.shape[0], 0, plan.n_insert  # packed positions: what does not move keeps its position
        changed = int(((plan.rank_map >= 0) & (plan.rank_map != torch.arange(plan.length))).sum())
        moved = plan.moves.shape[0]
        return moved, max(changed - moved, 0), plan.n_insert

    def bytes(self, dtype: torch.dtype) -> int:
        """Minimal traffic: keys and values that move and that are inserted are read and written once, keys that are
        only re-rotated likewise."""
        moved, turned, inserted = self._entries()
        row = self.rows * self.kv_heads * self.head_dim * dtype.itemsize
        return row * (4 * moved + 2 * turned + 4 * inserted)

    def flops(self) -> int:
        """Six operations a rotated pair of dimensions; the phases are shared by all rows and not counted."""
        moved, turned, inserted = self._entries()
        return self.rows * self.kv_heads * (moved + turned + inserted) * 3 * self.head_dim if self.rope else 0


def _cases() -> list[Case]:
    out = []
    for model, (layers, heads, dim, theta) in MODELS.items():
        for length in (2048, 8192, 32768):
            for discipline, rope in (("ordered", True), ("ordered", False), ("slots", False)):
                for edits, kind in ((1, "collapse"), (1, "expand"), (8, "mixed")):
                    name = f"{model}/{length // 1024}k/{discipline}{'-rope' if rope else ''}/{edits}-{kind}"
                    out.append(Case(name, layers, heads, dim, length, edits, kind, discipline, rope, theta))
    return out


CASES = _cases()
SMALL = [
    Case(f"small-{discipline}{'-rope' if rope else ''}-{edits}{kind}", 2, 2, dim, 41, edits, kind, discipline, rope,
         batch=batch, span=4)
    for discipline, rope in (("ordered", True), ("ordered", False), ("slots", True), ("slots", False))
    for edits, kind, dim, batch in ((1, "collapse", 8, 1), (1, "expand", 16, 2), (8, "mixed", 8, 2))
]  # fmt: skip
