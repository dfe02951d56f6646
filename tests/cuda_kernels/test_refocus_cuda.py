"""`refocus_` in CUDA C++: it decides what the numpy allocator decides, and the cache is what the oracle makes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from refocus_model import (
    allocation,
    assert_relaid,
    copied,
    flat_of,
    layout_of,
    relaid,
    resting,
    same_lists,
    same_state,
    without_layers,
)

from mc_kernels import LensScoreWeights, cuda_backend, lens_score
from mc_kernels.refocus import cuda, refocus_
from mc_kernels.refocus.cases import EMPTY, LARGE, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, poisoned_empty
from mc_runtime.focus.allocator import Cooldown

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NOTHING = {"min_gain": 0.0, "hysteresis": 0.0, "cooldown": 0}
# Opens gists until the last slot of the cache is in use.
FILLS = Case("fills", room=2, spare_slots=0, at_hand=1.0, rule=NOTHING)


def emulate(device: str, seed: int = 0, threads: int = 8, fault: int = 0) -> None:
    if device == "cpu":
        cuda_backend.library().emulate(seed, threads, 2, fault)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(*(x.reshape(-1).contiguous().view(torch.uint8) for x in (a, b)))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.sampled_from([2, 3, 4]))
    tokens = draw(st.integers(0, 20 * k))
    ends = st.integers(0, tokens)
    pinned = draw(st.lists(st.tuples(ends, ends).map(lambda x: (min(x), max(x))), max_size=2))
    return Case(
        "drawn",
        tokens=tokens,
        k=k,
        missing=draw(st.tuples(st.integers(0, 2), st.integers(0, 1))),
        share=draw(st.sampled_from([0.3, 0.6, 0.9])),
        at_hand=draw(st.sampled_from([0.5, 1.0])),
        room=draw(st.integers(-4 * k, 3 * k)),
        spare_slots=draw(st.integers(0, 2)),
        grid=draw(st.sampled_from([0.0, 0.0, 0.125])),
        pinned=tuple(pinned),
        rule=draw(
            st.fixed_dictionaries({
                "min_gain": st.sampled_from([0.0, 0.02, 0.25]),
                "hysteresis": st.sampled_from([0.0, 0.02, 0.125]),
                "cooldown": st.integers(0, 3),
                "max_edits": st.none() | st.integers(0, 6),
            })
        ),
    )  # fmt: skip


def decided(case: Case, seed: int, device: str) -> dict[str, Any]:
    """A context, without keys and values."""
    rng = np.random.default_rng(seed)
    args = case.context(rng, device)
    keys, rows = case.store_index(rng, args["state"], device)
    return {**args, "keys": keys, "rows": rows}


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(), st.integers(0, 2**32 - 1))
@example(Case("one-token-left", tokens=9, k=3, share=1.0, room=-8, pinned=((8, 9),), rule=NOTHING), 0)
def test_it_decides_as_the_allocator(device: str, case: Case, seed: int) -> None:
    """2,500 random forests: the same nodes change, and the layout, slots and moves are the runtime's."""
    for more in range(5):
        args = decided(case, seed + more, device)
        chosen = allocation(args)
        want = relaid(args, chosen)
        emulate(device, seed, threads=4)
        cuda.refocus_cuda(*without_layers(args, args["keys"], args["rows"]))
        assert_relaid(args, want, chosen)


def test_draws_reach_every_kind_of_decision() -> None:
    """The fuzz above would be worth little if most contexts did not change, or no weights were equal."""
    seen = dict.fromkeys(("opened", "closed", "both", "over", "few"), 0)
    for seed in range(40):
        for case in SMALL:
            args = decided(case, seed, "cpu")
            chosen, before = allocation(args), layout_of(args).entries
            opened, closed = len(chosen.expand), len(chosen.collapse)
            limit = args["rule"].max_edits
            seen["opened"] += opened > 0
            seen["closed"] += closed > 0
            seen["both"] += opened > 0 and closed > 0
            seen["over"] += len(before) + (case.k - 1) * (opened - closed) > args["rule"].budget
            seen["few"] += limit is not None and opened + closed >= limit
    assert min(seen.values()) >= 20, seen


@pytest.mark.parametrize(
    ("case", "dtype"), [(case, DTYPES[i % 3]) for i, case in enumerate((*SMALL, *EMPTY))],
    ids=lambda x: x.name if isinstance(x, Case) else str(x),
)  # fmt: skip
def test_against_the_oracle(case: Case, dtype: torch.dtype, device: str) -> None:
    """State and lists are the same; what stays or comes from the store keeps its bits, gists err as pooling may."""
    for seed in range(3):
        args = case.make(dtype, device, seed)
        n = args["state"].read().length
        exact, rival = copied(args), copied(args)
        exact |= {name: args[name].double() for name in "kv"}
        exact["store"] = type(args["store"])(*(getattr(args["store"], x).double() for x in "kv"), *flat_of(args)[16:18])
        exact["weights"] = [w.to(dtype=torch.float64) for w in args["weights"]]
        for x in (exact, rival):
            refocus_(**x, backend="ref")
        emulate(device, seed)
        old = copied(args)
        with poisoned_empty():
            refocus_(**args, backend="cuda")
        assert same_state(args["state"], rival["state"])
        assert same_lists(args["lists"], rival["lists"])
        numbers, inserted = args["state"].read(), args["lists"].inserted.long()
        gist = torch.zeros(args["state"].capacity, dtype=torch.bool, device=device)
        gist[inserted[: numbers.inserted][inserted[: numbers.inserted, 1] < 0, 0]] = True
        for name in "kv":
            assert same_bits(args[name][:, :, ~gist], rival[name][:, :, ~gist]), name
            assert_within_error_rule(
                args[name][:, :, gist], exact[name][:, :, gist], rival[name][:, :, gist], what=name
            )
            unused = args[name][:, :, max(n, numbers.length) :]
            assert same_bits(unused, old[name][:, :, max(n, numbers.length) :])


def test_vectors_of_16_bytes_and_columns_beyond_a_block(device: str) -> None:
    case = Case("wide", 2, 2, 136, k=4, tokens=200, share=0.7, room=-11, rule={"cooldown": 0})
    for dtype in DTYPES[:2]:
        args = case.make(dtype, device, 3)
        want = copied(args)
        refocus_(**want, backend="ref")
        emulate(device, threads=64)
        refocus_(**args, backend="cuda")
        assert args["state"].read().closed > 0
        assert same_state(args["state"], want["state"])
        torch.testing.assert_close(args["k"], want["k"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(args["v"], want["v"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize("case", [SMALL[2], SMALL[7]], ids=lambda c: c.name)
def test_every_order_and_size_of_block_gives_the_same(case: Case, device: str) -> None:
    if device != "cpu":
        pytest.skip("orders are drawn in the emulation")
    args = case.make(torch.float32, device, 1)
    results = []
    for seed, threads in enumerate((1, 3, 32, 40, 64, 64)):
        one = copied(args)
        emulate(device, seed, threads)
        refocus_(**one, backend="cuda")
        results.append(one)
    assert results[0]["state"].read().closed > 0
    for one in results[1:]:
        assert same_state(one["state"], results[0]["state"])
        assert same_lists(one["lists"], results[0]["lists"])
    assert same_bits(results[4]["k"], results[5]["k"])


def test_eight_thousand_entries_by_a_whole_block(device: str) -> None:
    """As many threads as on a GPU: all warps count, in several rounds."""
    args = decided(LARGE, 1, device)
    args["state"].born.zero_()
    chosen = allocation(args)
    want = relaid(args, chosen)
    emulate(device, threads=0)
    cuda.refocus_cuda(*without_layers(args, args["keys"], args["rows"]))
    assert_relaid(args, want, chosen)
    assert chosen.expand
    assert chosen.collapse


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_cycle_after_cycle(cooldown: int, device: str) -> None:
    """What rests is known from the state alone, and is what the controller's memory of past changes says."""
    case = Case("cycles", tokens=160, k=3, share=0.6, room=0, rule={"cooldown": cooldown, "max_edits": 8})
    args, rng, memory = decided(case, 5, device), np.random.default_rng(7), Cooldown(cooldown)
    args["state"].born.zero_()
    args["state"].numbers[1] = 0
    edits = 0
    for cycle in range(1, 15):
        frozen = memory.frozen(cycle)
        if cooldown:
            said = resting(args)
            counts = layout_of(args).counts
            shown = {level: set(nodes.tolist()) for level, nodes in frozen.items() if level < len(counts)}
            assert all(set(nodes.tolist()) <= shown.get(level, set()) for level, nodes in said.items())
        chosen = allocation(args, frozen)
        want = relaid(args, chosen)
        emulate(device, cycle, threads=4)
        cuda.refocus_cuda(*without_layers(args, args["keys"], args["rows"]))
        assert_relaid(args, want, chosen)
        assert args["state"].read().cycle == cycle
        memory.record(chosen.expand + chosen.collapse, cycle)
        edits += len(chosen.expand) + len(chosen.collapse)
        args["scores"].copy_(case.scores(rng, args["state"].capacity))
    assert edits > 20


def scorer(device: str, slots: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """LensNet over random entries by slot: queries [4, 16] to scores."""
    generator = torch.Generator().manual_seed(0)
    weights = LensScoreWeights.init(16, 3, width=16, n_heads=2, ffn_dim=16, generator=generator)
    weights = weights.with_tensors(*(x + 0.3 * torch.randn(x.shape, generator=generator) for x in weights.tensors()))
    weights = weights.to(device=torch.device(device))
    entries = torch.randn(slots, 16, generator=generator).to(device, torch.bfloat16)
    features = torch.randn(slots, 3, generator=generator).to(device)
    return lambda queries: lens_score(entries, features, queries.bfloat16(), weights, backend="cuda")


def test_scores_of_lens_score(device: str) -> None:
    """Score, allocate, plan and splice on the device, against the allocator and the oracle."""
    args = Case("scored", tokens=300, k=4, share=0.6, room=-9, rule={"cooldown": 0}).make(torch.float32, device, 1)
    generator = torch.Generator().manual_seed(1)
    emulate(device, threads=0)
    score = scorer(device, args["state"].capacity)
    edits = 0
    for _ in range(3):
        args["scores"] = score(torch.randn(4, 16, generator=generator).to(device))
        chosen, want = allocation(args), copied(args)
        relayout = relaid(args, chosen)
        refocus_(**want, backend="ref")
        emulate(device)
        refocus_(**args, backend="cuda")
        emulate(device, threads=0)
        assert_relaid(args, relayout, chosen)
        assert same_state(args["state"], want["state"])
        torch.testing.assert_close(args["k"], want["k"], rtol=1e-5, atol=1e-5)
        edits += len(chosen.expand) + len(chosen.collapse)
    assert edits > 3


def test_scores_that_are_no_numbers(device: str) -> None:
    args = decided(SMALL[0], 2, device)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e8, 0.3], device=device)
    args["scores"].copy_(values[torch.arange(args["scores"].numel(), device=device) % 5].view_as(args["scores"]))
    chosen = allocation(args)
    want = relaid(args, chosen)
    assert chosen.expand
    emulate(device)
    cuda.refocus_cuda(*without_layers(args, args["keys"], args["rows"]))
    assert_relaid(args, want, chosen)


def test_more_wanted_than_there_is_room_for(device: str) -> None:
    args = Case("wanted", at_hand=0.0, tokens=400, share=0.4, room=30, rule=NOTHING).make(torch.float32, device, 1)
    args["lists"] = type(args["lists"]).allocate(args["state"].capacity, 3, device)
    want = copied(args)
    refocus_(**want, backend="ref")
    emulate(device)
    refocus_(**args, backend="cuda")
    assert args["state"].read().wanted > 3
    assert same_lists(args["lists"], want["lists"])
    assert same_state(args["state"], want["state"])


def test_memory_around_the_views_stays_as_it_is(device: str) -> None:
    if device != "cpu":
        pytest.skip("guard bytes are checked on the CPU")
    args = SMALL[3].make(torch.bfloat16, device, 4)
    want = copied(args)
    refocus_(**want, backend="ref")
    guarded = {name: Guarded(args[name].transpose(1, 2), gap=3) for name in "kv"}
    args |= {name: g.view.transpose(1, 2) for name, g in guarded.items()}
    state = {
        name: Guarded(getattr(args["state"], name)) for name in ("levels", "index", "slots", "born", "pos", "bias")
    }
    args["state"] = type(args["state"])(
        **{name: g.view for name, g in state.items()}, numbers=args["state"].numbers
    )  # fmt: skip
    refocus_(**args, backend="cuda")
    assert same_state(args["state"], want["state"])
    for g in (*guarded.values(), *state.values()):
        g.check()


def test_the_workspace_depends_on_sizes_alone(device: str) -> None:
    args = SMALL[2].make(torch.float32, device, 2)
    call = flat_of(args)
    needed = cuda.refocus_workspace(*call)
    slots = args["state"].capacity
    assert needed <= 48 * slots + 4 * slots // 3 + slots // 3 * 2 * 4 * 4 + 16 * 12
    before = copied(args)
    with pytest.raises(ValueError, match=f"workspace: expected {needed} bytes on a multiple of 16, got 16 bytes"):
        cuda.refocus_cuda(*call, workspace=torch.empty(16, dtype=torch.uint8, device=device))
    assert same_state(args["state"], before["state"])
    emulate(device)
    cuda.refocus_cuda(*call, workspace=torch.empty(needed, dtype=torch.uint8, device=device))
    assert args["state"].read().closed > 0
    assert cuda.refocus_workspace(*flat_of(args)) == needed


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (1, r"refocus \(plan\): block 0, thread \d+: (read|write) .*(races with thread|outside every view)"),
        (2, r"refocus \(plan\): block 0, thread \d+: (read|write) .*(races with thread|outside every view)"),
        (3, r"refocus \(apply\): block \d, thread \d+: write .*(races with thread|outside every view)"),
    ],
    ids=["wrong-slot", "no-barrier", "wrong-write"],
)
def test_a_deliberate_error_is_noticed(fault: int, words: str, seed: int, device: str) -> None:
    if device != "cpu":
        pytest.skip("deliberate errors are in the emulated build alone")
    args = (FILLS if fault == 3 else SMALL[3]).make(torch.float32, device, 0)
    args["state"].born.zero_()
    args["scores"][:, 0] += fault == 3
    emulate(device, seed, 8, fault)
    with pytest.raises(RuntimeError, match=words):
        refocus_(**args, backend="cuda")


def test_a_deliberate_wrong_weight_is_noticed(device: str) -> None:
    """A tie that is broken the other way is told apart by the comparison with the allocator."""
    if device != "cpu":
        pytest.skip("deliberate errors are in the emulated build alone")
    different = 0
    for seed in range(20):
        args = decided(SMALL[4], seed, device)
        chosen = allocation(args)
        want = relaid(args, chosen)
        emulate(device, seed, 4, fault=4)
        cuda.refocus_cuda(*without_layers(args, args["keys"], args["rows"]))
        try:
            assert_relaid(args, want, chosen)
        except AssertionError:
            different += 1
    assert different > 0


@pytest.mark.gpu
def test_a_graph_scores_and_refocuses() -> None:
    """Score, allocate, plan and splice are one CUDA graph; a replay does what the oracle does to the same state."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = LARGE.make(torch.bfloat16, "cuda", 1)
    args["state"].born.zero_()
    generator = torch.Generator().manual_seed(1)
    score, queries = scorer("cuda", args["state"].capacity), torch.zeros(4, 16, device="cuda")

    def step() -> None:
        args["scores"].copy_(score(queries))
        cuda.refocus_cuda(*flat_of(args), workspace=workspace)

    workspace = torch.empty(cuda.refocus_workspace(*flat_of(args)), dtype=torch.uint8, device="cuda")
    score(queries)  # what is made at the first call is there from now on
    graph = torch.cuda.CUDAGraph()
    before = copied(args)
    with torch.cuda.graph(graph):
        step()
    assert same_state(args["state"], before["state"])
    edits = 0
    for cycle in range(4):
        want = copied(args)
        queries.copy_(torch.randn(4, 16, generator=generator))
        graph.replay()
        torch.cuda.synchronize()
        want["scores"] = args["scores"].clone()
        chosen = allocation(want)
        relayout = relaid(want, chosen)
        refocus_(**want, backend="ref")
        assert_relaid(args, relayout, chosen)
        assert same_state(args["state"], want["state"])
        torch.testing.assert_close(args["k"], want["k"], rtol=0.02, atol=0.02)
        torch.testing.assert_close(args["v"], want["v"], rtol=0.02, atol=0.02)
        edits += len(chosen.expand) + len(chosen.collapse)
        assert args["state"].read().cycle == before["state"].read().cycle + cycle + 1
    assert edits > 0
