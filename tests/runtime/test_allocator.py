"""The focus allocator against brute force, exact dynamic programming, and its contracts."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc_runtime.errors import BudgetError, InputError
from mc_runtime.focus import closure
from mc_runtime.focus.allocator import (
    Allocation,
    Cooldown,
    FocusParams,
    FocusProblem,
    allocate,
    base_slots,
    coarsest_cut,
    layout_entries,
    pinned_nodes,
)

Node = tuple[int, int]
FREE = FocusParams(min_gain=0.0, hysteresis=0.0)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def by_level(nodes) -> dict[int, np.ndarray]:
    levels: dict[int, list[int]] = {}
    for level, index in sorted(nodes):
        levels.setdefault(level, []).append(index)
    return {level: ints(*index) for level, index in levels.items()}


def as_set(levels) -> set[Node]:
    return {(level, int(i)) for level, index in levels.items() for i in index}


def problem(counts, budget, utility=None, expanded=(), pinned=(), frozen=(), block_size=2) -> FocusProblem:
    utility = utility or {}
    nodes = by_level(utility)
    return FocusProblem(
        block_size=block_size,
        counts=counts,
        expanded=by_level(expanded),
        utility={L: (index, np.array([utility[L, int(i)] for i in index], float)) for L, index in nodes.items()},
        pinned=pinned,
        budget=budget,
        frozen=by_level(frozen),
    )


def parent_of(node: Node, block_size: int, counts) -> Node | None:
    level, index = node[0] + 1, node[1] // block_size
    return (level, index) if level < len(counts) and index < counts[level] else None


def children_of(node: Node, block_size: int) -> list[Node]:
    level, index = node
    return [(level - 1, index * block_size + j) for j in range(block_size)] if level > 1 else []


def all_nodes(counts) -> list[Node]:
    return [(level, i) for level in range(1, len(counts)) for i in range(counts[level])]


def roots(block_size: int, counts) -> list[Node]:
    return [node for node in all_nodes(counts) if parent_of(node, block_size, counts) is None]


def closed_sets(block_size: int, counts) -> list[frozenset[Node]]:
    """Every set of nodes that is closed upward."""

    def below(node: Node) -> list[frozenset[Node]]:
        parts = [below(child) for child in children_of(node, block_size)]
        return [frozenset()] + [frozenset([node]).union(*combo) for combo in itertools.product(*parts)]

    return [
        frozenset().union(*combo) for combo in itertools.product(*(below(root) for root in roots(block_size, counts)))
    ]


def score(chosen, current: set[Node], utility: dict[Node, float], params: FocusParams) -> float:
    """The objective as documented: reserve price for new nodes, floor at 0 for those that are expanded now."""
    total = 0.0
    for node in chosen:
        u = utility.get(node, 0.0)
        if node in current:
            total += max(u + params.hysteresis - params.min_gain, 0.0)
        else:
            total += u - params.min_gain
    return total


def check_result(p: FocusProblem, params: FocusParams, result: Allocation) -> set[Node]:
    """The contracts that hold for every result."""
    chosen, current = as_set(result.expanded), as_set(p.expanded)
    for node in chosen:
        parent = parent_of(node, p.block_size, p.counts)
        assert parent is None or parent in chosen
    assert set(result.expanded) == set(range(1, len(p.counts)))
    assert set(result.expand) == chosen - current
    assert set(result.collapse) == current - chosen
    assert len(result.expand) == len(set(result.expand))
    assert [level for level, _ in result.expand] == sorted((level for level, _ in result.expand), reverse=True)
    assert [level for level, _ in result.collapse] == sorted(level for level, _ in result.collapse)
    assert result.slots == base_slots(p.block_size, p.counts) + (p.block_size - 1) * len(chosen)
    assert result.slots <= p.budget
    levels, index = layout_entries(p.block_size, p.counts, result.expanded)
    assert levels.size == result.slots
    check_tiling(p.block_size, p.counts, levels, index)
    known = {(L, int(i)): v for L, (idx, val) in p.utility.items() for i, v in zip(idx, val, strict=True)}
    value = sum(known.get(node, 0.0) for node in chosen) + params.hysteresis * len(chosen & current)
    assert result.value == pytest.approx(value)
    return chosen


def check_tiling(block_size: int, counts, levels: np.ndarray, index: np.ndarray) -> None:
    assert levels.dtype == np.int8
    assert index.dtype == np.int64
    spans = block_size ** levels.astype(np.int64)
    starts, stops = index * spans, (index + 1) * spans
    assert np.array_equal(starts, np.concatenate([[0], stops])[: starts.size])
    assert (int(stops[-1]) if stops.size else 0) == counts[0]
    for level, i in zip(levels.tolist(), index.tolist(), strict=True):
        assert level == 0 or i < counts[level]


@st.composite
def trees(draw) -> tuple[int, tuple[int, ...]]:
    """Up to three levels, complete, ragged, or with nodes not stored yet; few enough nodes to enumerate all cuts."""
    block_size = draw(st.sampled_from([2, 3]))
    depth = draw(st.integers(0, 3))
    most = 17 if block_size == 2 else 29
    counts = [draw(st.integers(0, most))]
    for _ in range(depth):
        full = counts[-1] // block_size
        counts.append(draw(st.integers(max(0, full - 1), full)))
    return block_size, tuple(counts)


@st.composite
def problems(draw):
    block_size, counts = draw(trees())
    nodes = all_nodes(counts)
    exact = st.sampled_from([-0.5, -0.02, 0.0, 0.01, 0.02, 0.03, 0.25, 1.0])
    value = draw(st.sampled_from([exact, st.floats(-1, 1, width=32)]))
    utility = {node: draw(value) for node in nodes if draw(st.booleans())}
    expanded: set[Node] = set()
    for node in reversed(nodes):
        parent = parent_of(node, block_size, counts)
        if (parent is None or parent in expanded) and draw(st.booleans()):
            expanded.add(node)
    frozen = {node for node in nodes if draw(st.integers(0, 5)) == 0}
    pinned = []
    for _ in range(draw(st.integers(0, 2))):
        start = draw(st.integers(0, counts[0]))
        pinned.append((start, draw(st.integers(start, min(counts[0], start + 4)))))
    units = draw(st.integers(-1, len(nodes) + 1))
    budget = base_slots(block_size, counts) + units * (block_size - 1) + draw(st.integers(0, block_size - 2))
    params = FocusParams(
        min_gain=draw(st.sampled_from([0.0, 0.02, 0.2])), hysteresis=draw(st.sampled_from([0.0, 0.02, 0.2]))
    )
    return problem(counts, budget, utility, expanded, pinned, frozen, block_size), utility, params


@settings(max_examples=300, deadline=None)
@given(problems())
def test_equals_brute_force(case):
    p, utility, params = case
    current, frozen = as_set(p.expanded), as_set(p.frozen)
    pins = as_set(pinned_nodes(p.block_size, p.counts, p.pinned))
    units = (p.budget - base_slots(p.block_size, p.counts)) // (p.block_size - 1)
    if len(pins) > units:
        with pytest.raises(BudgetError):
            allocate(p, params)
        return
    result = allocate(p, params)
    chosen = check_result(p, params, result)

    held = set(pins)
    for node in frozen & current:
        up: Node | None = node
        while up is not None:
            held.add(up)
            up = parent_of(up, p.block_size, p.counts)
    legal = [x for x in closed_sets(p.block_size, p.counts) if pins <= x and len(x) <= units]
    if len(held) > units:  # frozen nodes are released, only as many as it takes
        legal = [x for x in legal if x <= held and len(x) == units]
    else:
        legal = [x for x in legal if held <= x and not (x & frozen) - current - pins]
    assert chosen in legal
    best = max(score(x, current, utility, params) for x in legal)
    assert score(chosen, current, utility, params) == pytest.approx(best, abs=1e-6)

    # lazy: what was expanded and could stay as it is has stayed
    if len(chosen) < units:
        assert not {n for n in current - chosen if parent_of(n, p.block_size, p.counts) in chosen | {None}}
    # settled: the same utilities give no further edit
    again = allocate(FocusProblem(**{**p.__dict__, "expanded": result.expanded}), params)
    if len(held) <= units:
        assert again.expand == again.collapse == []


@settings(max_examples=200, deadline=None)
@given(problems(), st.integers(0, 6))
def test_max_edits(case, most):
    p, _, params = case
    current = as_set(p.expanded)
    try:
        whole = allocate(p, params)
    except BudgetError:
        return
    limited = FocusParams(params.min_gain, params.hysteresis, max_edits=most)
    result = allocate(p, limited)
    chosen = check_result(p, limited, result)
    if len(whole.expand) + len(whole.collapse) <= most:
        assert chosen == as_set(whole.expanded)
        return
    pins = as_set(pinned_nodes(p.block_size, p.counts, p.pinned))
    assert pins <= chosen
    units = (p.budget - base_slots(p.block_size, p.counts)) // (p.block_size - 1)
    forced = len(pins - current) + max(0, len(current | pins) - units)
    frozen_in = as_set(p.frozen) & current
    if frozen_in <= chosen:
        assert len(result.expand) + len(result.collapse) <= max(most, forced)
    if most == 0 and forced == 0:
        assert chosen == current


@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_layout_entries_tile_the_history(tree, data):
    block_size, counts = tree
    assert coarsest_cut(block_size, counts)[0].size == base_slots(block_size, counts)
    expanded = data.draw(st.sampled_from(closed_sets(block_size, counts)))
    levels, index = layout_entries(block_size, counts, by_level(expanded))
    check_tiling(block_size, counts, levels, index)
    assert levels.size == base_slots(block_size, counts) + (block_size - 1) * len(expanded)
    shown = set(zip(levels.tolist(), index.tolist(), strict=True))
    assert not shown & expanded
    for node in shown - set(roots(block_size, counts)):
        parent = parent_of(node, block_size, counts)
        assert parent is None or parent in expanded


@settings(max_examples=100, deadline=None)
@given(trees(), st.data())
def test_pinned_nodes_intersect(tree, data):
    block_size, counts = tree
    start = data.draw(st.integers(0, counts[0]))
    stop = data.draw(st.integers(start, counts[0]))
    expected = {
        (level, i)
        for level, i in all_nodes(counts)
        if max(start, i * block_size**level) < min(stop, (i + 1) * block_size**level)
    }
    assert as_set(pinned_nodes(block_size, counts, [(start, stop), (stop, stop)])) == expected


def exact_best(block_size: int, counts, weight: dict[Node, float], units: int) -> float:
    """Tree knapsack over all nodes: the greatest weight of a closed set of at most `units` nodes."""

    def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        out = np.full(min(a.size + b.size - 1, units + 1), -np.inf)
        for taken, gain in enumerate(b[: out.size]):
            part = a[: out.size - taken] + gain
            out[taken : taken + part.size] = np.maximum(out[taken : taken + part.size], part)
        return out

    def table(node: Node) -> np.ndarray:
        inside = np.zeros(1)
        for child in children_of(node, block_size):
            inside = join(inside, table(child))
        return np.concatenate([[0.0], weight[node] + inside])

    total = np.zeros(1)
    for root in roots(block_size, counts):
        total = join(total, table(root))
    return float(total.max())


def hull_below(block_size: int, counts, weight: dict[Node, float], units: int) -> tuple[float, int, float]:
    """(value and size of the hull's largest set that fits, price at which it is found), by bisection."""

    def priced(price: float) -> tuple[float, int]:
        value: dict[Node, float] = {}
        for node in all_nodes(counts):
            below = sum(max(0.0, value[child]) for child in children_of(node, block_size))
            value[node] = weight[node] - price + below
        chosen = set()
        for node in reversed(all_nodes(counts)):
            if value[node] > 0 and parent_of(node, block_size, counts) in chosen | {None}:
                chosen.add(node)
        return sum(weight[node] for node in chosen), len(chosen)

    low, high = 0.0, 64.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if priced(middle)[1] > units else (low, middle)
    return *priced(high), high


@pytest.mark.parametrize("core", [0, 16, 256])
@pytest.mark.parametrize("seed", range(6))
def test_middling_sizes_lie_between_hull_and_optimum(seed, core, monkeypatch):
    rng = np.random.default_rng(seed)
    block_size, counts, units = 6, (1800, 300, 50, 8, 1), int(rng.integers(5, 120))
    costly = -1.0 if seed % 2 else 0.0  # inner nodes that only bundles pay for
    weight = {node: float(rng.random() if node[0] == 1 else costly + 0.5 * rng.random()) for node in all_nodes(counts)}
    p = problem(counts, base_slots(block_size, counts) + units * (block_size - 1), weight, block_size=block_size)
    monkeypatch.setattr(closure, "CORE_NODES", core)
    value = allocate(p, FREE).value
    best = exact_best(block_size, counts, weight, units)
    hull, size, price = hull_below(block_size, counts, weight, units)
    assert hull - 1e-6 <= value <= best + 1e-6
    assert best - value <= price * (units - size) + 1e-6  # the units that the straddling bundle leaves free
    if core == 256:
        assert value == pytest.approx(best, abs=1e-6)


def test_large_core_is_settled_in_bounded_size():
    counts = (2**14, 2**13, 2**12, 2**11)
    rng = np.random.default_rng(0)
    utility = {node: float(rng.choice([-0.25, 0.25, 0.5])) for node in all_nodes(counts)}  # many ties
    p = problem(counts, base_slots(2, counts) + 1000, utility)
    result = allocate(p, FREE)
    assert len(as_set(result.expanded)) == 1000
    again = allocate(FocusProblem(**{**p.__dict__, "expanded": result.expanded}), FREE)
    assert again.value >= result.value - 1e-6


def test_chained_expansion_over_three_levels():
    counts = (16, 8, 4, 2)
    p = problem(counts, 2 + 3, {(1, 5): 1.0})
    result = allocate(p)
    assert result.expand == [(3, 1), (2, 2), (1, 5)]
    assert allocate(problem(counts, 2 + 2, {(1, 5): 1.0})).expand == []  # no room for the whole chain: nothing
    assert allocate(problem(counts, 2 + 3, {(1, 5): 0.05})).expand == []  # 0.05 / 3 is below min_gain
    assert len(allocate(problem(counts, 2 + 3, {(1, 5): 0.06})).expand) == 3


def test_forced_collapse_over_several_levels():
    counts = (8, 4, 2, 1)
    everything = all_nodes(counts)
    utility = {(1, 0): 1.0, (1, 1): 1.0, (1, 2): 0.1, (1, 3): 0.2}
    p = problem(counts, 1 + 4, utility, everything)
    result = allocate(p)
    assert result.collapse == [(1, 2), (1, 3), (2, 1)]
    assert result.slots == 5
    nothing = allocate(problem(counts, 1, utility, everything))
    assert nothing.collapse == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1), (3, 0)]


def test_forced_collapse_takes_the_least_useful_then_the_oldest():
    counts = (8, 4)
    now = [(1, i) for i in range(4)]
    p = problem(counts, 4 + 3, {(1, 0): -0.1, (1, 1): -0.3, (1, 2): -0.2}, now)
    assert allocate(p).collapse == [(1, 1)]
    assert allocate(problem(counts, 4 + 2, {}, now)).collapse == [(1, 0), (1, 1)]


def test_useless_but_free_stays_and_goes_for_a_better_one():
    counts = (8, 4)
    now = [(1, 0), (1, 1)]
    assert allocate(problem(counts, 4 + 2, {(1, 0): -1.0}, now)).collapse == []
    result = allocate(problem(counts, 4 + 2, {(1, 0): -1.0, (1, 3): 0.03}, now))
    assert (result.expand, result.collapse) == ([(1, 3)], [(1, 0)])
    assert allocate(problem(counts, 4 + 2, {(1, 0): -1.0, (1, 3): 0.019}, now)).expand == []


@pytest.mark.parametrize(("gain", "swaps"), [(0.51, False), (0.5199, False), (0.5201, True)])
def test_hysteresis_stops_small_swaps(gain, swaps):
    p = problem((4, 2), 2 + 1, {(1, 0): 0.5, (1, 1): gain}, [(1, 0)])
    result = allocate(p)
    assert bool(result.expand) == bool(result.collapse) == swaps


def test_min_gain_is_reached_exactly():
    assert allocate(problem((4, 2), 4, {(1, 0): 0.02, (1, 1): 0.0199})).expand == [(1, 0)]


def test_nodes_without_utility_are_not_opened():
    assert allocate(problem((8, 4, 2, 1), 8, {(1, 0): -1.0}), FREE).expand == []


def test_pins_win_over_frozen_and_over_budgeted_nodes():
    counts = (8, 4, 2)
    p = problem(counts, 2 + 2, {(2, 0): 9.0}, [(2, 0)], pinned=[(7, 8)], frozen=[(2, 0), (2, 1), (1, 3)])
    result = allocate(p)
    assert (result.expand, result.collapse) == ([(2, 1), (1, 3)], [(2, 0)])


def test_frozen_nodes_keep_their_state():
    counts = (8, 4)
    p = problem(counts, 4 + 1, {(1, 0): 0.0, (1, 1): 5.0, (1, 2): 4.0}, [(1, 0)], frozen=[(1, 0)])
    assert allocate(p).expand == []
    p = problem(counts, 4 + 1, {(1, 0): 0.0, (1, 1): 5.0, (1, 2): 4.0}, [(1, 0)], frozen=[(1, 1)])
    assert allocate(p).expand == [(1, 2)]


def test_frozen_nodes_are_released_cheapest_first_over_budget():
    now = [(1, i) for i in range(4)]
    p = problem((8, 4), 4 + 2, {(1, 0): 0.3, (1, 1): 0.1, (1, 2): 0.2, (1, 3): 9.0}, now, frozen=now[:3])
    assert allocate(p).collapse == [(1, 1), (1, 3)]


def test_max_edits_takes_the_best_first():
    counts = (16, 8)
    gains = {(1, i): 0.1 * i for i in range(8)}
    now = [(1, 0), (1, 1)]
    limited = FocusParams(max_edits=2)
    assert allocate(problem(counts, 8 + 4, gains, now), limited).expand == [(1, 7), (1, 6)]
    swap = allocate(problem(counts, 8 + 2, gains, now), limited)
    assert (swap.expand, swap.collapse) == ([(1, 7)], [(1, 0)])
    forced = allocate(problem(counts, 8 + 4, gains, now, pinned=[(4, 8)]), FocusParams(max_edits=1))
    assert forced.expand == [(1, 3), (1, 2)]


def test_budget_error_names_the_numbers():
    with pytest.raises(BudgetError, match=r"needs 4 slots, got 3"):
        allocate(problem((4, 2, 1), 3, pinned=[(0, 3)]))
    with pytest.raises(BudgetError, match=r"needs 3 slots, got 2"):
        allocate(problem((3,), 2))


@pytest.mark.parametrize("counts", [(0,), (0, 0, 0), (3,), (31, 0)])
def test_empty_and_short_histories(counts):
    p = problem(counts, 40, pinned=[(0, counts[0])], block_size=32)
    result = allocate(p)
    assert check_result(p, FocusParams(), result) == set()
    assert result.slots == counts[0]
    assert layout_entries(32, counts, {})[1].tolist() == list(range(counts[0]))


def test_ragged_tail():
    counts = (23, 4, 1)  # 5 blocks of 4 tokens, the last not stored yet, and 3 tokens
    levels, index = layout_entries(4, counts, {2: ints(0), 1: ints(1)})
    assert levels.tolist() == [1, 0, 0, 0, 0, 1, 1] + [0] * 7
    assert index.tolist() == [0, 4, 5, 6, 7, 2, 3, *range(16, 23)]
    assert base_slots(4, counts) == coarsest_cut(4, counts)[0].size == 8


def test_cooldown():
    cooldown = Cooldown(2)
    cooldown.record([(1, 7), (1, 3), (2, 0)], cycle=5)
    assert cooldown.frozen(5) == {}
    assert as_set(cooldown.frozen(6)) == {(1, 3), (1, 7), (2, 0)}
    cooldown.record([(1, 3)], cycle=6)
    restored = Cooldown.from_dict(json.loads(json.dumps(cooldown.to_dict())))
    for memory in (cooldown, restored):
        assert as_set(memory.frozen(7)) == {(1, 3), (1, 7), (2, 0)}
        assert as_set(memory.frozen(8)) == {(1, 3)}
        assert memory.frozen(9) == {}
    cooldown.record([], cycle=20)
    assert cooldown.to_dict() == {"cycles": 2, "changed": []}
    idle = Cooldown(0)
    idle.record([(1, 0)], cycle=0)
    assert idle.frozen(1) == {}
    for broken in ({}, {"cycles": 1, "changed": [[1]]}, {"cycles": -1, "changed": []}):
        with pytest.raises(InputError, match="cooldown"):
            Cooldown.from_dict(broken)


def test_cooldown_stops_a_node_from_flapping():
    counts, cooldown, now = (4, 2), Cooldown(2), {1: ints(0)}
    history = []
    for cycle in range(6):
        wanted = {(1, cycle % 2): 1.0, (1, 1 - cycle % 2): 0.0}
        p = problem(counts, 2 + 1, wanted, as_set(now), frozen=as_set(cooldown.frozen(cycle)))
        result = allocate(p)
        cooldown.record(result.expand + result.collapse, cycle)
        now = result.expanded
        history.append(len(result.expand))
    assert history == [0, 1, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 1}, "block_size: expected"),
        ({"counts": ()}, "counts: expected"),
        ({"counts": (16, 9)}, r"counts\[1\]: expected at most 8"),
        ({"counts": (16, -1)}, r"counts\[1\]: expected a non-negative"),
        ({"budget": 8.5}, "budget: expected"),
        ({"expanded": [1]}, "expanded: expected a mapping"),
        ({"expanded": {"1": ints(0)}}, "expanded: expected levels"),
        ({"expanded": {1: ints(0)}}, r"expanded\[1\]: expected every stored parent.*\(2, 0\)"),
        ({"expanded": {2: ints(1, 0)}}, r"expanded\[2\]: expected sorted"),
        ({"expanded": {2: ints(0, 0)}}, r"expanded\[2\]: expected sorted"),
        ({"expanded": {2: ints(4)}}, r"expanded\[2\]: expected indices of the 4 stored nodes, got 4"),
        ({"expanded": {0: ints(0)}}, r"expanded\[0\]: expected indices of the 0 stored"),
        ({"expanded": {2: np.array([0.5])}}, r"expanded\[2\]: expected a one-dimensional integer"),
        ({"frozen": {3: ints(0)}}, r"frozen\[3\]: expected indices"),
        ({"utility": {1: ints(0)}}, r"utility\[1\]: expected a pair"),
        ({"utility": {1: (ints(-1), np.ones(1))}}, r"utility\[1\]: expected indices"),
        ({"utility": {1: (ints(0, 1), np.ones(1))}}, r"utility\[1\]: expected 2 values"),
        ({"utility": {1: (ints(0), np.array(["a"]))}}, r"utility\[1\]: expected nats"),
        ({"utility": {1: (ints(0), np.array([np.nan]))}}, r"utility\[1\]: expected finite"),
        ({"utility": {1: (ints(0), np.array([-np.inf]))}}, r"utility\[1\]: expected finite"),
        ({"pinned": [(0.0, 2)]}, "pinned: expected"),
        ({"pinned": [(3, 2)]}, "pinned: expected"),
        ({"pinned": [(0, 17)]}, r"pinned: expected.*\[0, 16\].*\(0, 17\)"),
    ],
)
def test_input_errors(change, message):
    good = problem((16, 8, 4), 16)
    with pytest.raises(InputError, match=message) as error:
        allocate(FocusProblem(**{**good.__dict__, **change}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change", [{"min_gain": -1.0}, {"hysteresis": float("nan")}, {"cooldown": None}, {"max_edits": -1}]
)
def test_params_are_checked(change):
    with pytest.raises(InputError, match=next(iter(change))):
        FocusParams(**change)
