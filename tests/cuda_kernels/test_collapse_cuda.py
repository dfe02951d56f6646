"""`collapse_` in CUDA C++ against the oracle in fp64, in place over its inputs; what moves keeps its bits."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch

from mc_kernels import collapse_, cuda_backend
from mc_kernels.gist_pool import cuda
from mc_kernels.gist_pool.collapse_cases import EMPTY, SMALL, Case
from mc_kernels.testing import Guarded

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import collapse_model
from collapse_model import CHAINED, make
from splice_model import same_bits

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# More gists than shared memory keeps: 20 * 2 * 512 floats.
KEPT_FAR = Case("larger/kept-far", 1, 1, 512, 44, 20, block_size=2)


@pytest.fixture(autouse=True)
def _blocks(device: str) -> None:
    if device == "cpu":
        cuda_backend.library().emulate(1, 64, 1, 0)


run_and_check = functools.partial(collapse_model.run_and_check, "cuda")


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate((*SMALL, *EMPTY, KEPT_FAR))],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)  # fmt: skip
def test_against_the_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    seeds = range(3, 7) if dtype == torch.float32 else [3]
    run_and_check(*(make(case, dtype, device, seed=seed) for seed in seeds))


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
