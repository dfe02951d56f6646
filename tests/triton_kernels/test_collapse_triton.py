"""`collapse_` in Triton against the oracle in fp64, in place over its inputs; what moves keeps its bits."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import collapse_model
from allocations import NoAllocation
from collapse_model import CHAINED, make
from splice_model import same_bits

from mc_kernels import BackendError, GistPoolWeights, collapse_
from mc_kernels.gist_pool.collapse_cases import EMPTY, SMALL, Case
from mc_kernels.gist_pool.collapse_stage import resolve_moves

# More blocks than a tile, more entries to move than are copied at a time.
LARGER = Case("larger/many", 1, 1, 64, 330, 17, block_size=9)
EACH = [(case, torch.float32) for case in (*SMALL, *EMPTY, LARGER)]
EACH += [(case, dtype) for case in (SMALL[2], SMALL[4]) for dtype in (torch.bfloat16, torch.float16)]


run_and_check = functools.partial(collapse_model.run_and_check, "triton")


@pytest.mark.parametrize(("case", "dtype"), EACH, ids=lambda x: x.name if isinstance(x, Case) else str(x))
def test_against_the_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    seeds = range(3, 7) if dtype == torch.float32 else [3]
    run_and_check(*(make(case, dtype, device, seed=seed) for seed in seeds))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)], ids=str)
def test_weights_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    args = make(SMALL[2], dtypes[0], device)
    run_and_check(args | {"weights": args["weights"].to(dtype=dtypes[1])})


def test_without_moves(device: str) -> None:
    args = make(SMALL[0], torch.bfloat16, device)
    run_and_check(args | {"moves": None, "slots": args["children"][:, 3:4]})


def test_moves_alone(device: str) -> None:
    args = make(SMALL[0], torch.float32, device)
    run_and_check(args | {"children": args["children"][:0], "slots": args["slots"][:0], "moves": CHAINED})


def test_moves_that_overlap_and_follow_each_other(device: str) -> None:
    """Entries that move twice, onto sources, within their own range, and under a gist."""
    args = make(SMALL[0], torch.bfloat16, device)
    run_and_check(args | {"moves": CHAINED, "slots": torch.tensor([[24]])})


def test_gists_over_the_children_of_other_blocks(device: str) -> None:
    args = make(Case("x", 2, 2, 24, 128, 2), torch.float32, device)
    children = torch.randperm(128, generator=torch.Generator().manual_seed(1))[:64].view(2, 32)
    slots = torch.stack((children[1, :1], children[0, -1:]))
    run_and_check(args | {"children": children, "slots": slots, "moves": None})


def test_views_in_memory_that_stays_as_it_is(device: str) -> None:
    """Slots beside heads, gaps between rows, a margin around: nothing but the view is written."""
    case = SMALL[2]
    args = make(case, torch.bfloat16, device)
    shape = args["k"].transpose(2, 3).shape
    around = torch.full((2, *shape[:2], shape[2] + 4, shape[3], shape[4] + 3), 7.0).to(device, torch.bfloat16)
    for i, name in enumerate("kv"):
        view = around[i, :, :, 2:-2, :, 1:-2].transpose(2, 3)
        args[name] = view.copy_(args[name])
    before = around.clone()
    run_and_check(args)
    inside = torch.zeros(around.shape, dtype=torch.bool, device=device)
    inside[:, :, :, 2:-2, :, 1:-2] = True
    assert torch.equal(around[~inside], before[~inside])
    assert not torch.equal(around, before)


def test_the_same_input_gives_the_same_bits(device: str) -> None:
    calls = [make(SMALL[4], torch.bfloat16, device) for _ in range(2)]
    for args in calls:
        collapse_(**args, backend="triton")
    assert all(same_bits(calls[0][x], calls[1][x]) for x in "kv")


def test_staged_once_and_launched_with_memory_of_the_caller(device: str) -> None:
    """What an engine does around a CUDA graph: only the launch is inside, and it allocates nothing."""
    from mc_kernels.gist_pool.collapse_triton import collapse_launch, collapse_workspace, stage

    args = make(SMALL[0], torch.bfloat16, device) | {"moves": CHAINED}
    weights = args["weights"].to(dtype=torch.float32)
    k, v = args["k"], args["v"]
    staged = stage(args["children"], args["slots"], CHAINED, k.device)
    assert (staged.n_blocks, staged.chained) == (1, True)
    size = collapse_workspace(k, weights.w, staged)
    space = torch.full((size + 16,), 0xFF, dtype=torch.uint8, device=device)
    start = [x.clone() for x in (k, v)]
    want = [x.clone() for x in (k, v)]
    collapse_(*want, weights, args["children"], args["slots"], moves=CHAINED, backend="triton")

    def launch() -> None:
        collapse_launch(k, v, *weights.tensors(), staged, workspace=space)

    with NoAllocation():
        launch()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launch()
        for x, old in zip((k, v), start, strict=True):
            x.copy_(old)
        before = torch.cuda.memory_allocated()
        graph.replay()
        assert torch.cuda.memory_allocated() == before
    assert same_bits(k, want[0])
    assert same_bits(v, want[1])
    assert (space[-16:] == 0xFF).all()
    with pytest.raises(ValueError, match="workspace: expected at least"):
        collapse_launch(k, v, *weights.tensors(), staged, workspace=space[:8])


def test_opcheck_and_compile(device: str) -> None:
    args = make(SMALL[0], torch.float32, device)
    k, v = args["k"].clone(), args["v"].clone()
    rest = (args["children"], args["slots"], args["moves"])
    torch.library.opcheck(torch.ops.mc.collapse_.default, (k, v, *args["weights"].tensors(), *rest, "triton"))

    def call(k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        collapse_(k, v, GistPoolWeights(*weights), rest[0], rest[1], moves=rest[2], backend="triton")
        return k.sum()

    k, v = args["k"].clone(), args["v"].clone()
    torch.compile(call, fullgraph=True, backend="aot_eager")(k, v, *args["weights"].tensors())
    collapse_(**args, backend="triton")
    assert same_bits(k, args["k"])
    assert same_bits(v, args["v"])


def test_what_it_cannot_take(device: str) -> None:
    args = make(SMALL[0], torch.float64, device)
    before = args["k"].clone()
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        collapse_(**args, backend="triton")
    assert same_bits(args["k"], before)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 10)), max_size=6))
def test_a_gather_is_what_moves_come_to(moves: list[tuple[int, int, int]]) -> None:
    want = np.arange(31)
    for source, destination, count in moves:
        want[destination : destination + count] = want[source : source + count].copy()
    sources, destinations, chained = resolve_moves(np.array(moves, dtype=np.int64).reshape(-1, 3))
    got = np.arange(31)
    got[destinations] = np.arange(31)[sources]
    assert (got == want).all()
    assert len(set(destinations.tolist())) == len(destinations)
    assert chained == bool(set(sources.tolist()) & set(destinations.tolist()))


def test_the_plans_of_the_cases_are_no_chains() -> None:
    for case in (*SMALL, LARGER):
        sources, destinations, chained = resolve_moves(case.plan.segments.numpy())
        assert not chained
        assert np.array_equal(np.stack((sources, destinations), 1), case.plan.moves.numpy())
