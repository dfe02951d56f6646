"""`collapse_`: blocks of a slot cache are pooled and their gists written in their place, all layers in one call.

What a call reads and writes is the same however often it has run before. Checked on up to CHECKED_ROWS rows from the
first to the last: all their entries in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mc_kernels import collapse_
from mc_kernels.gist_pool.weights import GistPoolWeights

from .base import Check, Workload, error_rule
from .gist_pool import plain_pool
from .kv_splice import CHECKED_ROWS

Args = dict[str, Any]


def put(x: Tensor, gists: Tensor, slots: Tensor, moves: Tensor) -> None:
    """x [L, Hkv, S, D]: moves whose destinations are no sources, then gists [L, Hkv, n, D] to their slots."""
    for source, destination, count in moves.tolist():
        x[..., destination : destination + count, :] = x[..., source : source + count, :].clone()
    x.index_copy_(-2, slots.flatten().to(x.device), gists)


def blocks_of(x: Tensor, children: Tensor) -> Tensor:
    """x [L, Hkv, S, D] -> the children's entries [L, Hkv, n, K, D]."""
    return x.index_select(-2, children.flatten().to(x.device)).unflatten(-2, children.shape)


def plain_collapse(
    k: Tensor, v: Tensor, weights: GistPoolWeights, children: Tensor, slots: Tensor, moves: Tensor
) -> None:
    """k, v [L, Hkv, S, D] (one sequence): gather, pool, move, scatter."""
    gists = plain_pool(blocks_of(k, children), blocks_of(v, children), weights)
    for x, gist in zip((k, v), gists, strict=True):
        put(x, gist.flatten(-3, -2), slots, moves)


class Collapse(Workload):
    op = "collapse_"

    @staticmethod
    def touched(case: Any, dtype: torch.dtype) -> int:
        return int(case.cache_bytes(dtype) + case.bytes(dtype))

    def ours(self, inputs: Args, backend: str) -> None:
        collapse_(**inputs, backend=backend)

    def result(self, inputs: Args, out: None) -> tuple[Tensor, Tensor]:
        """k and v [L, Hkv, new_length, D]: the slots in use."""
        n = self.case.plan.new_length
        return inputs["k"].squeeze(1)[..., :n, :], inputs["v"].squeeze(1)[..., :n, :]

    def plain(self, inputs: Args) -> None:
        plain_collapse(**inputs | {"k": inputs["k"].squeeze(1), "v": inputs["v"].squeeze(1)})

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        spread = torch.linspace(0, self.case.layers - 1, min(CHECKED_ROWS, self.case.layers))
        layers = spread.round().long().to(self.device)

        def sample(dtype: torch.dtype) -> Args:
            weights = GistPoolWeights(*(x[layers].to(dtype) for x in inputs["weights"].tensors()))
            return inputs | {"k": inputs["k"][layers].to(dtype), "v": inputs["v"][layers].to(dtype), "weights": weights}

        exact, plain = sample(torch.float64), sample(self.dtype)
        collapse_(**exact, backend="ref")
        self.plain(plain)
        judged = self.result(exact, None), self.result(plain, None)
        return lambda out: error_rule([x[layers] for x in out], *judged)
