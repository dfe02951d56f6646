"""`SplicePlan`: against a plain list, the moves' safe order, what it refuses; random sequences of splices."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from splice_model import EACH_BACKEND, edits_of, plans, same_bits, splice_list, turn

from mc_kernels import Edit, PageTable, RopeSpec, SplicePlan, kv_splice_
from mc_kernels.rope import apply_rope


def edits_in(p: SplicePlan) -> list[Edit]:
    return [Edit(*e) for e in p.edits.tolist()]


def run_segments(p: SplicePlan, memory: list[int]) -> None:
    """Segment after segment, each as memmove."""
    for source, destination, count in p.segments.tolist():
        memory[destination : destination + count] = memory[source : source + count]


# Neighbouring segments that move the same way by different distances: order matters, to the left and to the right.
LEFTWARD = SplicePlan.from_edits(20, [Edit(2, 4, 1), Edit(9, 4, 1), Edit(16, 2, 1)], capacity=20)
RIGHTWARD = SplicePlan.from_edits(12, [Edit(2, 1, 4), Edit(6, 0, 3), Edit(8, 1, 2)], capacity=24)
BOTH = SplicePlan.from_edits(19, [Edit(2, 4, 1), Edit(8, 1, 6), Edit(10, 0, 2), Edit(12, 5, 1)], capacity=23)


@settings(max_examples=80, deadline=None)
@example(LEFTWARD)
@example(RIGHTWARD)
@example(BOTH)
@given(st.sampled_from(["ordered", "slots"]).flatmap(plans))
def test_plan_is_the_list(p: SplicePlan) -> None:
    """Executed in place, a plan leaves by rank what slicing a list leaves; entries by name, holes -1."""
    names = list(range(p.length))
    new = list(range(1000, 1000 + p.n_insert))
    want = splice_list(names, edits_in(p), new)
    assert p.new_length == len(want)
    memory = [-1] * p.capacity
    for rank, slot in enumerate(p.slots.tolist()):
        memory[slot] = names[rank]
    start = list(memory)
    run_segments(p, memory)
    for name, slot in zip(new, p.insert_slots.tolist(), strict=True):
        memory[slot] = name
    assert [memory[s] for s in p.new_slots.tolist()] == want
    assert sorted(p.new_slots.tolist()) == list(range(p.new_length))
    assert memory[max(p.length, p.new_length) :] == start[max(p.length, p.new_length) :]
    # The derived views say the same.
    assert [want[r] for r in p.rank_map.tolist() if r >= 0] == [n for n in names if n in want]
    assert [n in want for n in names] == [r >= 0 for r in p.rank_map.tolist()]
    assert [want[r] for r in p.insert_ranks.tolist()] == new
    moved = {(s, d) for s, d in p.moves.tolist()}
    kept = [(int(p.slots[i]), int(p.new_slots[r])) for i, r in enumerate(p.rank_map.tolist()) if r >= 0]
    assert moved == {(s, d) for s, d in kept if s != d}
    stays = [s + i for s, d, n in p.stays.tolist() for i in range(n) if s == d]
    assert stays == sorted(s for s, d in kept if s == d)


@settings(max_examples=60, deadline=None)
@given(plans("slots"))
def test_slots_move_only_what_they_must(p: SplicePlan) -> None:
    """Only entries beyond the new end move, into slots before it: the fewest moves that leave [0, new_length) full."""
    removed = p.edits[:, 1].sum().item()
    assert len(p.moves) <= max(0, removed - p.n_insert)
    assert (p.moves[:, 0] >= p.new_length).all()
    assert (p.moves[:, 1] < p.new_length).all()


@st.composite
def histories(draw: st.DrawFn) -> list[list[Edit]]:
    length, out = draw(st.integers(0, 16)), []
    out.append([Edit(0, 0, length)])
    for _ in range(draw(st.integers(1, 6))):
        edits = draw(edits_of(length, 20))
        length += sum(e.insert - e.remove for e in edits)
        out.append(edits)
    return out


@EACH_BACKEND
@settings(max_examples=25, deadline=None)
@given(history=histories())
def test_histories_in_all_disciplines(backend: str, history: list[list[Edit]]) -> None:
    """Any sequence of splices: both disciplines, rotated or not, paged or not, hold what a list holds."""
    h, s, d, page = 1, 20, 4, 3
    rope = RopeSpec.from_theta(50.0, d)
    pages = PageTable(torch.randperm(7, generator=torch.Generator().manual_seed(1))[None], page)
    pool = torch.randn(256, h, d, generator=torch.Generator().manual_seed(2))  # entry by name
    slots_of: dict[tuple[str, bool], torch.Tensor | None] = {}
    caches: dict[tuple[str, bool], list[torch.Tensor]] = {}
    for key in ((disc, rot) for disc in ("ordered", "slots") for rot in (False, True)):
        caches[key] = [torch.full((1, h, s, d), float("nan")) for _ in range(2)]
        slots_of[key] = None
    paged = [torch.full((7, h, page, d), float("nan")) for _ in range(2)]
    names: list[int] = []
    fresh = 0
    for edits in history:
        new = list(range(fresh, fresh + sum(e.insert for e in edits)))
        fresh += len(new)
        k_new = pool[new].movedim(0, 1)[None]
        v_new = k_new * 2
        for (disc, rot), (k, v) in caches.items():
            p = SplicePlan.from_edits(
                len(names), edits, capacity=s, discipline=disc, slots=slots_of[disc, rot] if disc == "slots" else None
            )
            kv_splice_(k, v, k_new, v_new, p, rope if rot else None, backend=backend)
            slots_of[disc, rot] = p.new_slots
            if (disc, rot) == ("ordered", True):
                kv_splice_(*paged, k_new, v_new, p, rope, pages=pages, backend=backend)
        names = splice_list(names, edits, new)
    want = pool[names].movedim(0, 1)[None]
    turned = turn(want, torch.arange(len(names)), rope.inv_freq)
    for (disc, rot), (k, v) in caches.items():
        slots = slots_of[disc, rot]
        assert slots is not None
        assert same_bits(v[:, :, slots], want * 2)
        if rot:
            torch.testing.assert_close(k[:, :, slots].double(), turned, rtol=0, atol=1e-5)
        else:
            assert same_bits(k[:, :, slots], want)
    for pooled, flat in zip(paged, caches["ordered", True], strict=True):
        got = pooled[pages.table[0].long()].movedim(1, 0).flatten(1, 2)[None]
        assert same_bits(got[:, :, : len(names)], flat[:, :, : len(names)])


def test_from_scratch_at_final_positions() -> None:
    """The packed rotated cache after a splice is the rotation of the raw keys at their ranks."""
    rope, raw = RopeSpec.from_theta(1e4, 8), torch.randn(2, 2, 20, 8)
    k = apply_rope(raw, torch.arange(20), rope)
    p = SplicePlan.from_edits(20, [Edit(3, 5, 1)], capacity=20)
    new = torch.randn(2, 2, 1, 8)
    kv_splice_(k, k.clone(), new, new.clone(), p, rope, backend="ref")
    want = apply_rope(torch.cat((raw[:, :, :3], new, raw[:, :, 8:]), 2), torch.arange(16), rope)
    torch.testing.assert_close(k[:, :, :16], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "edits", "kwargs", "error", "words"),
    [
        (10, [Edit(-1, 1, 1)], {}, ValueError, "edits[0]: expected start, remove and insert >= 0"),
        (10, [Edit(0, 1, 0), Edit(3, -2, 1)], {}, ValueError, "edits[1]: expected start, remove and insert"),
        (10, [Edit(0, 1, -1)], {}, ValueError, "edits[0]"),
        (10, [Edit(8, 3, 1)], {}, ValueError, "edits[0]: expected start + remove <= length = 10"),
        (10, [Edit(11, 0, 1)], {}, ValueError, "edits[0]: expected start + remove"),
        (10, [Edit(1, 2**62, 1), Edit(2**62, 2**62, 0)], {}, ValueError, "edits[0]"),
        (10, [Edit(5, 1, 1), Edit(3, 1, 1)], {}, ValueError, "edits[1]: expected start >= 6"),
        (10, [Edit(2, 4, 1), Edit(5, 1, 1)], {}, ValueError, "edits[1]: expected start >= 6"),
        (10, [Edit(2, 0, 5), Edit(4, 1, 8)], {}, ValueError, "edits[1]: expected at most capacity = 16"),
        (10, [Edit(0, 0, 17)], {}, ValueError, "entries after the splice, got 27"),
        (10, [Edit(0, 0, 2**62)] * 4, {}, ValueError, f"after the splice, got {2**64 + 10}; Edit(start=0, remove=0, i"),
        (10, [(1, 2)], {}, TypeError, "edits: expected Edit"),
        (10, [(1.0, 2, 3)], {}, TypeError, "edits: expected Edit"),
        (17, [], {}, ValueError, "length: expected 0 <= length <= capacity = 16"),
        (-1, [], {}, ValueError, "length"),
        (10.0, [], {}, TypeError, "length: expected an integer, got float 10.0"),
        (10, [], {"discipline": "heap"}, ValueError, "discipline: expected one of ordered, slots, got 'heap'"),
        (3, [], {"slots": [0, 1, 2]}, ValueError, "slots: expected None in the ordered"),
        (3, [], {"slots": [0, 1], "discipline": "slots"}, ValueError, "slots: expected shape [3]"),
        (3, [], {"slots": [0, 1, 3], "discipline": "slots"}, ValueError, "slots: expected a permutation"),
        (3, [], {"slots": [0, -1, 2], "discipline": "slots"}, ValueError, "slots: expected a permutation"),
        (3, [], {"slots": [0, 2, 2], "discipline": "slots"}, ValueError, "slot 1 is missing"),
        (3, [], {"slots": [0.0, 1.0, 2.0], "discipline": "slots"}, TypeError, "slots: expected integers"),
        (3, [], {"slots": torch.zeros(3), "discipline": "slots"}, TypeError, "slots: expected dtype"),
    ],
)
def test_refusals(length: int, edits: Any, kwargs: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        SplicePlan.from_edits(length, edits, capacity=16, **kwargs)
    assert words in str(caught.value)


def test_adjacent_and_equal_starts_are_legal() -> None:
    p = SplicePlan.from_edits(6, [Edit(2, 0, 2), Edit(2, 1, 1), Edit(3, 2, 0)], capacity=10)
    assert splice_list(range(6), edits_in(p), [10, 11, 12]) == [0, 1, 10, 11, 12, 5]
    assert p.new_length == 6
    assert p.insert_slots.tolist() == [2, 3, 4]
    assert p.rank_map.tolist() == [0, 1, -1, -1, -1, 5]


def test_page_table_refusals() -> None:
    with pytest.raises(TypeError, match="table: expected dtype"):
        PageTable(torch.zeros(1, 2), 4)
    with pytest.raises(ValueError, match="table: expected shape"):
        PageTable(torch.zeros(2, dtype=torch.int64), 4)
    with pytest.raises(ValueError, match="page_size: expected at least 1"):
        PageTable(torch.zeros(1, 2, dtype=torch.int64), 0)
    with pytest.raises(TypeError, match=r"page_size: expected an int, got float 4\.0"):
        PageTable(torch.zeros(1, 2, dtype=torch.int64), 4.0)  # type: ignore[arg-type]


def test_a_large_plan_is_quick() -> None:
    """32,768 entries, 60 edits, a permuted map: about 0.2 ms; the bound only catches a loop over entries."""
    edits = [Edit(i * 500, 32, 1) if i % 2 else Edit(i * 500, 1, 32) for i in range(60)]
    slots = np.random.default_rng(0).permutation(32_768)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        p = SplicePlan.from_edits(32_768, edits, capacity=32_768, discipline="slots", slots=slots)
        best = min(best, time.perf_counter() - start)
    assert p.new_length == 32_768
    assert len(p.moves) == 0
    assert best < 2e-3
