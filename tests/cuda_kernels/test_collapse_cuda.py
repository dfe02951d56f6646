"""`collapse_` in CUDA C++ against the oracle in fp64, in place over its inputs; what moves keeps its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import collapse_, cuda_backend
from mc_kernels.gist_pool import cuda
from mc_kernels.gist_pool.collapse_cases import EMPTY, SMALL, Case
from mc_kernels.gist_pool.collapse_ref import collapse_ref
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHAINED = torch.tensor([[30, 20, 8], [22, 24, 6], [0, 3, 5], [39, 30, 1]])
# More gists than shared memory keeps: 20 * 2 * 512 floats.
KEPT_FAR = Case("larger/kept-far", 1, 1, 512, 44, 20, block_size=2)


@pytest.fixture(autouse=True)
def _blocks(device: str) -> None:
    if device == "cpu":
        cuda_backend.library().emulate(1, 64, 1, 0)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def make(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Any]:
    args = case.make(dtype, device, seed)
    return {**args, "k": args["k"].clone(), "v": args["v"].clone()}


def run_and_check(args: dict[str, Any]) -> None:
    """k and v as the oracle leaves them: pooled slots by the error rule, the others to the bit."""
    weights, children, slots = args["weights"], args["children"], args["slots"]
    moves = torch.empty((0, 3), dtype=torch.int64) if args["moves"] is None else args["moves"]
    exact, rival = ([args[x].to(dtype, copy=True) for x in "kv"] for dtype in (torch.float64, args["k"].dtype))
    for x, w in ((exact, weights.to(dtype=torch.float64)), (rival, weights)):
        collapse_ref(*x, *w.tensors(), children, slots, moves)
    with poisoned_empty():
        collapse_(args["k"], args["v"], weights, children, slots, moves=args["moves"], backend="cuda")
    pooled = torch.zeros(args["k"].shape[3], dtype=torch.bool)
    pooled[slots.flatten()] = True
    for name, e, r in zip("kv", exact, rival, strict=True):
        assert same_bits(args[name][..., ~pooled, :], r[..., ~pooled, :]), name
        assert_within_error_rule(args[name][..., pooled, :], e[..., pooled, :], r[..., pooled, :], what=name)


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate((*SMALL, *EMPTY, KEPT_FAR))],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)  # fmt: skip
def test_against_the_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    run_and_check(make(case, dtype, device, seed=3))


def test_weights_of_another_dtype(device: str) -> None:
    args = make(SMALL[2], torch.bfloat16, device)
    run_and_check(args | {"weights": args["weights"].to(dtype=torch.float32)})


def test_without_moves(device: str) -> None:
    args = make(SMALL[0], torch.bfloat16, device)
    run_and_check(args | {"moves": None, "slots": args["children"][:, 3:4]})


@pytest.mark.parametrize("seed", range(3))
def test_moves_that_overlap_and_follow_each_other(seed: int, device: str) -> None:
    """Entries that move twice, onto sources, within their own range, and under a gist; alone and with a block."""
    args = make(SMALL[0], torch.float32, device)
    if device == "cpu":
        cuda_backend.library().emulate(seed, 64, 2, 0)
    run_and_check({**args, "k": args["k"].clone(), "moves": CHAINED, "slots": torch.tensor([[24]])})
    run_and_check(args | {"children": args["children"][:0], "slots": args["slots"][:0], "moves": CHAINED})


def test_long_moves_left_and_right(device: str) -> None:
    """Segments of several tiles that overlap their destinations."""
    args = make(Case("x", 1, 2, 64, 200, block_size=4), torch.float32, device)
    run_and_check(args | {"moves": torch.tensor([[5, 0, 190], [3, 8, 180]])})


def test_gists_over_the_children_of_other_blocks(device: str) -> None:
    args = make(Case("x", 1, 2, 24, 32, 2, block_size=8), torch.float32, device)
    children = torch.randperm(32, generator=torch.Generator().manual_seed(1))[:16].view(2, 8)
    slots = torch.stack((children[1, :1], children[0, -1:]))
    run_and_check(args | {"children": children, "slots": slots, "moves": None})


def test_memory_around_the_views_stays_as_it_is(device: str) -> None:
    if device != "cpu":
        pytest.skip("guard bytes are checked on the CPU")
    args = make(SMALL[1], torch.bfloat16, device)
    guarded = {name: Guarded(args[name].transpose(2, 3), gap=3) for name in "kv"}
    run_and_check(args | {name: g.view.transpose(2, 3) for name, g in guarded.items()})
    for g in guarded.values():
        g.check()


def test_a_workspace_for_many_gists(device: str) -> None:
    args = make(KEPT_FAR, torch.float32, device)
    flat = (args["k"], args["v"], *args["weights"].tensors(), args["children"], args["slots"], args["moves"])
    needed = cuda.collapse_workspace(*flat)
    assert needed == 20 * 2 * 512 * 4
    before = args["k"].clone()
    with pytest.raises(ValueError, match=f"workspace: expected {needed} bytes on a multiple of 16, got 16 bytes"):
        cuda.collapse_cuda(*flat, workspace=torch.empty(16, dtype=torch.uint8, device=device))
    assert same_bits(args["k"], before)
    workspace = torch.empty(needed, dtype=torch.uint8, device=device)
    cuda.collapse_cuda(*flat, workspace=workspace)
    want = make(KEPT_FAR, torch.float32, device)
    collapse_(**want, backend="cuda")
    assert all(same_bits(args[name], want[name]) for name in "kv")


def test_a_missing_barrier_between_segments_is_noticed(device: str) -> None:
    if device != "cpu":
        pytest.skip("deliberate errors are in the emulated build alone")
    args = make(SMALL[0], torch.float32, device)
    args |= {"moves": CHAINED, "slots": args["children"][:, 3:4]}
    cuda_backend.library().emulate(0, 64, 1, 1)
    with pytest.raises(RuntimeError, match=r"collapse: block \d+, thread \d+: .* races with thread"):
        collapse_(**args, backend="cuda")
