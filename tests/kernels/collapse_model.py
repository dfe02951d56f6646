"""What the tests of `collapse_` on a GPU's kernels share: calls on memory of their own, held against the oracle."""

from __future__ import annotations

from typing import Any

import torch
from splice_model import same_bits

from mc_kernels import collapse_
from mc_kernels.gist_pool.collapse_cases import Case
from mc_kernels.gist_pool.collapse_ref import collapse_ref
from mc_kernels.testing import assert_within_error_rule, poisoned_empty

# Entries that move twice, onto sources, and within their own range, of some 40 slots.
CHAINED = torch.tensor([[30, 20, 8], [22, 24, 6], [0, 3, 5], [39, 30, 1]])


def make(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    args = case.make(dtype, device, seed)
    return {**args, "k": args["k"].clone(), "v": args["v"].clone()}


def run_and_check(backend: str, *draws: dict[str, Any]) -> None:
    """Collapse; k and v are as the oracle leaves them: pooled slots by the error rule, of all draws together, the
    others to the bit."""
    pooled = [_run(backend, args) for args in draws]
    for name, of_name in zip("kv", zip(*pooled, strict=True), strict=True):
        got, exact, rival = (torch.cat(x) for x in zip(*of_name, strict=True))
        assert_within_error_rule(got, exact, rival, what=name)


def _run(backend: str, args: dict[str, Any]) -> list[list[torch.Tensor]]:
    """Of k and v: pooled slots, and what they are by the oracle in fp64 and in their own precision; flat."""
    weights, children, slots = args["weights"], args["children"], args["slots"]
    moves = torch.empty((0, 3), dtype=torch.int64) if args["moves"] is None else args["moves"]
    exact, rival = ([args[x].to(dtype, copy=True) for x in "kv"] for dtype in (torch.float64, args["k"].dtype))
    for x, w in ((exact, weights.to(dtype=torch.float64)), (rival, weights)):
        collapse_ref(*x, *w.tensors(), children, slots, moves)
    with poisoned_empty():
        collapse_(args["k"], args["v"], weights, children, slots, moves=args["moves"], backend=backend)
    pooled = torch.zeros(args["k"].shape[3], dtype=torch.bool)
    pooled[slots.flatten()] = True
    found = []
    for name, e, r in zip("kv", exact, rival, strict=True):
        assert same_bits(args[name][..., ~pooled, :], r[..., ~pooled, :]), name
        found.append([x[..., pooled, :].flatten().cpu() for x in (args[name], e, r)])
    return found
