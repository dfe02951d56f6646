"""No peer: what the peers share whose caches lie token by token, [S, Hkv, D], as serving engines have them.

What moves and what is new is gathered in a buffer, the engine's own operation rotates the keys there, and both are
written back to where they belong; layer by layer, so that the buffer stays in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mc_kernels.rope import RopeSpec, phases

from ..workloads.kv_splice import KvSplice


@dataclass(frozen=True)
class TokenMajor:
    """Copies [R, S, Hkv, D] of a cache and [R, M, Hkv, D] of the new entries, and a splice of them.

    old, new: [T] positions before and after of what is gathered; a new entry, unrotated, comes from position 0.
    rows: how many of the R go through the buffers [rows, T, Hkv, D] at a time.
    """

    k: Tensor
    v: Tensor
    k_new: Tensor
    v_new: Tensor
    segments: list[tuple[int, int, int]]
    slots: Tensor
    old: Tensor
    new: Tensor
    rows: int
    k_buffer: Tensor
    v_buffer: Tensor

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> TokenMajor:
        k, v, k_new, v_new = (
            inputs[x].flatten(0, -4).transpose(1, 2).contiguous() for x in ("k", "v", "k_new", "v_new")
        )
        plan, device = inputs["plan"], k.device
        source, destination = plan.moves.T
        old = torch.cat((source, torch.zeros_like(plan.insert_slots)))
        rows = 1 if device.type == "cpu" else k.shape[0]
        buffer = k.new_empty(rows, old.numel(), *k.shape[2:])
        return cls(
            k, v, k_new, v_new, [tuple(s) for s in plan.segments.tolist()], plan.insert_slots.to(device),
            old.to(device), torch.cat((destination, plan.insert_slots)).to(device), rows,
            buffer, torch.empty_like(buffer),
        )  # fmt: skip

    def splice(self, rotate: Callable[[Tensor], object]) -> None:
        """rotate: turns keys [rows * T, Hkv, D] in place, those of a row one after the other."""
        for first in range(0, self.k.shape[0], self.rows):
            some = slice(first, first + self.rows)
            self._gather(self.k[some], self.k_new[some], self.k_buffer)
            rotate(self.k_buffer.flatten(0, 1))
            self._scatter(self.k[some], self.k_buffer)
            self._gather(self.v[some], self.v_new[some], self.v_buffer)
            self._scatter(self.v[some], self.v_buffer)

    def _gather(self, x: Tensor, fresh: Tensor, buffer: Tensor) -> None:
        torch.cat([x[:, s : s + n] for s, _, n in self.segments] + [fresh], dim=1, out=buffer)

    def _scatter(self, x: Tensor, buffer: Tensor) -> None:
        at = 0
        for _, destination, n in self.segments:
            x[:, destination : destination + n] = buffer[:, at : at + n]
            at += n
        x.index_copy_(1, self.slots, buffer[:, at:])

    def result(self, workload: KvSplice) -> tuple[Tensor, Tensor]:
        return workload.by_slot(self.k.transpose(1, 2), self.v.transpose(1, 2))


def cos_sin_cache(positions: Tensor, rope: RopeSpec, dtype: torch.dtype) -> Tensor:
    """[n, D] cosines, then sines, in the model's dtype, as vLLM keeps them (`RotaryEmbedding.cos_sin_cache`)."""
    return torch.cat(phases(positions, rope.inv_freq_on(positions.device)), dim=-1).to(dtype)
