"""The focus allocator: from utilities in nats to the expansions and collapses of one refocus.

A layout is the set X of expanded nodes, closed upward; it fills base + (K-1) * |X| slots. Chained expansion over
several levels, swaps at a full budget, and (multi-level) collapse over budget are all one problem: choose X, of at most
(budget - base) // (K-1) nodes, so that the sum of the weights is greatest (`closure.best_closed_set`), with

    weight of a node that is not expanded now:  u - min_gain
    weight of a node that is expanded now:      max(u + hysteresis - min_gain, 0)

where u is the node's utility. `min_gain` is thus the reserve price of K-1 slots: a node, or a chain of nodes (bundle),
is opened only if it gains that much per node. The floor at 0 is laziness: an expanded node of little use is not
collapsed for its own sake, only over budget or to make room for a bundle that is worth more. For equal numbers of nodes
the order is that of the sum of u + hysteresis * [expanded now], so that a swap has to gain more than the hysteresis.

Pinned nodes are in X in any case. Frozen nodes keep their state, unless a pin needs them expanded; if the budget cannot
hold the pins and the frozen expanded nodes (with their ancestors), it is given to these alone and the least useful
frozen ones go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mc_runtime.errors import BudgetError, InputError
from mc_runtime.focus.closure import best_closed_set, weight_of
from mc_runtime.focus.forest import (
    MAX_UTILITY,
    Bools,
    Floats,
    Forest,
    Ints,
    NodeSet,
    Positions,
    base_slots,
    check_closed,
    check_nodes,
    check_utility,
    coarsest_cut,
    layout_entries,
    pinned_nodes,
)

__all__ = [
    "Allocation",
    "Cooldown",
    "FocusParams",
    "FocusProblem",
    "allocate",
    "base_slots",
    "coarsest_cut",
    "layout_entries",
    "pinned_nodes",
]

TIE = 1e-9
"""Nats: the scale on which ties are broken."""


@dataclass(frozen=True)
class FocusParams:
    """How readily a refocus edits. Raises `InputError` for negative or non-finite values."""

    min_gain: float = 0.02  # nats per node that an expansion must gain
    hysteresis: float = 0.02  # nats by which a swap must be better
    cooldown: int = 3  # refocus cycles for which a changed node is frozen; for `Cooldown`, not used by `allocate`
    max_edits: int | None = None  # node changes in one refocus; forced ones happen and count

    def __post_init__(self) -> None:
        for name in ("min_gain", "hysteresis"):
            value = getattr(self, name)
            if not 0 <= value <= MAX_UTILITY:
                raise InputError(f"{name}: expected nats between 0 and {MAX_UTILITY:g}, got {value!r}")
        for name in ("cooldown", "max_edits"):
            value = getattr(self, name)
            if not (value is None and name == "max_edits") and (not isinstance(value, int) or value < 0):
                raise InputError(f"{name}: expected a non-negative integer, got {value!r}")


@dataclass(frozen=True)
class FocusProblem:
    """What one refocus decides on. Checked by `allocate`.

    Utilities are sparse; missing is 0, and a node without a utility is opened only on the way to one that has one.
    """

    block_size: int  # K
    counts: tuple[int, ...]  # tokens, then stored nodes of level 1, 2, ...; counts[L] <= counts[L-1] // K
    expanded: NodeSet  # level -> sorted indices of the nodes expanded now; closed upward
    utility: Mapping[int, tuple[Ints, Floats]]  # level -> (sorted indices, nats gained by being expanded)
    pinned: Sequence[tuple[int, int]]  # token ranges [start, stop) to be shown as tokens
    budget: int  # slots
    frozen: NodeSet = field(default_factory=dict)  # level -> sorted indices that may not change


@dataclass(frozen=True)
class Allocation:
    """The layout chosen, and the edits that lead to it."""

    expanded: dict[int, Ints]  # every level of the tree -> sorted indices; closed upward
    expand: list[tuple[int, int]]  # (level, index) of newly expanded nodes, parents before children
    collapse: list[tuple[int, int]]  # of newly collapsed nodes, children before parents
    slots: int  # filled by the layout
    value: float  # nats: sum over the expanded nodes of utility, plus hysteresis for those expanded before


def allocate(problem: FocusProblem, params: FocusParams | None = None) -> Allocation:
    """Choose the nodes to expand; `params` defaults to `FocusParams()`.

    Optimal, except for large problems with many near-ties; the loss is then less than one bundle (see `closure`).
    Deterministic: of equally useful nodes the later ones are expanded. Raises `InputError` for unusable arguments,
    `BudgetError` if the budget cannot hold the coarsest layout and the pins.
    """
    params = params or FocusParams()
    block, counts = problem.block_size, problem.counts
    if not isinstance(problem.budget, int | np.integer):
        raise InputError(f"budget: expected a number of slots, got {problem.budget!r}")
    base = base_slots(block, counts)
    pins = check_nodes("pinned", counts, pinned_nodes(block, counts, problem.pinned))
    current = check_nodes("expanded", counts, problem.expanded)
    check_closed("expanded", block, counts, current)
    frozen = check_nodes("frozen", counts, problem.frozen)
    indices, nats = check_utility(counts, problem.utility)

    needed = base + (block - 1) * sum(index.size for index in pins.values())
    if needed > problem.budget:
        raise BudgetError(
            f"budget: the coarsest layout ({base} slots) with the pinned text as tokens needs {needed} slots, "
            f"got {problem.budget}; raise the budget or pin less"
        )
    limit = (problem.budget - base) // (block - 1)

    forest = Forest.build(block, counts, [indices, current, pins])
    utility = np.zeros(forest.index.size)
    scored = forest.locate(indices)
    utility[scored] = nats
    now, pin, still = forest.mask(current), forest.mask(pins), forest.mask(frozen)
    weight = _weights(forest, utility, scored, now, params, problem)

    held = pin | forest.close_upward(still & now)
    if np.count_nonzero(held) > limit:  # not even the frozen nodes fit: nothing else may stay
        chosen = _best_between(forest, weight, pin, held, limit)
    else:
        chosen = _best_between(forest, weight, held, ~still | now, limit)
        if params.max_edits is not None:
            chosen = _limit_edits(forest, weight, now, held, chosen, limit, params.max_edits)
    return Allocation(
        expanded={level: forest.index[part][chosen[part]] for level, part in enumerate(forest.levels, start=1)},
        expand=_nodes(forest, chosen & ~now)[::-1],
        collapse=_nodes(forest, now & ~chosen),
        slots=base + (block - 1) * int(np.count_nonzero(chosen)),
        value=weight_of(utility, chosen) + params.hysteresis * int(np.count_nonzero(chosen & now)),
    )


def _weights(
    forest: Forest, utility: Floats, scored: Positions, now: Bools, params: FocusParams, problem: FocusProblem
) -> Floats:
    """[N]: the weights of the module's head, with ties broken; `scored` are the positions of the nodes with a utility.

    Ties: an expanded node stays against one that is not; of expanded nodes at the floor the less useful goes first; of
    equal nodes the earlier in the history goes first. All are about `TIE` in size, so that they decide nothing else.
    """
    place = np.empty(forest.index.size)  # end of the span as a share of the history, in (0, 1]
    for level, part in enumerate(forest.levels, start=1):
        place[part] = (forest.index[part] + 1) * (problem.block_size**level / max(problem.counts[0], 1))
    weight = np.full(forest.index.size, -max(params.min_gain, TIE))  # below 0: never opened for its own sake
    weight[scored] = utility[scored] - params.min_gain + 0.5 * TIE * place[scored]
    spare = utility[now] + (params.hysteresis - params.min_gain)
    weight[now] = np.maximum(spare, 0.0) + TIE * (2 + spare / (1 + np.abs(spare)) + 0.5 * place[now])
    return weight


def _best_between(forest: Forest, weight: Floats, least: Bools, most: Bools, limit: int) -> Bools:
    """[N]: the best closed set of at most `limit` nodes that contains `least` (closed) and lies in `most`."""
    return best_closed_set(forest, np.where(least, np.inf, np.where(most, weight, -np.inf)), limit)


def _limit_edits(
    forest: Forest, weight: Floats, now: Bools, held: Bools, target: Bools, limit: int, max_edits: int
) -> Bools:
    """[N]: `target`, or the best of the way there if it takes more than `max_edits` changes.

    Starts from the layout with the forced changes only (pins expanded, the cheapest collapsed if over budget), then
    takes the best expansions and, where they need room, the cheapest collapses of the changes that remain.
    """
    if np.count_nonzero(target ^ now) <= max_edits:
        return target
    start = now | held
    if np.count_nonzero(start) > limit:
        start = _best_between(forest, weight, held, start, limit)
    size = int(np.count_nonzero(start))
    left, free = max_edits - int(np.count_nonzero(start ^ now)), limit - size
    if left <= 0:
        return start
    openings = left if left <= free else (left + free) // 2  # beyond the free units every opening needs a collapse
    grown = _best_between(forest, weight, start, start | target, size + openings)
    excess = max(0, int(np.count_nonzero(grown)) - limit)
    kept = _best_between(forest, weight, start & target, start, size - excess) if excess else start
    reached: Bools = kept | (grown & ~start)
    gain = float(weight[reached & ~start].sum() - weight[start & ~reached].sum())
    return reached if gain > 0 else start


def _nodes(forest: Forest, chosen: Bools) -> list[tuple[int, int]]:
    """The chosen nodes as (level, index), level 1 first."""
    return [
        (level, index)
        for level, part in enumerate(forest.levels, start=1)
        for index in forest.index[part][chosen[part]].tolist()
    ]


class Cooldown:
    """Remembers in which refocus cycle a node changed, so that it rests for the next `cycles` ones."""

    def __init__(self, cycles: int) -> None:
        """`cycles`: for how many cycles after a change a node is frozen; 0 freezes nothing."""
        if not isinstance(cycles, int) or cycles < 0:
            raise InputError(f"cooldown: expected a non-negative integer, got {cycles!r}")
        self.cycles = cycles
        self._changed: dict[tuple[int, int], int] = {}

    def record(self, edits: Iterable[tuple[int, int]], cycle: int) -> None:
        """Note that the nodes `edits` (level, index) changed in `cycle`; forget those that have rested long enough."""
        self._changed = {node: at for node, at in self._changed.items() if at + self.cycles >= cycle}
        self._changed.update(((int(level), int(index)), int(cycle)) for level, index in edits)

    def frozen(self, cycle: int) -> dict[int, Ints]:
        """The nodes that may not change in `cycle`: level -> sorted indices. A change in c rests c+1 .. c+cycles."""
        resting: dict[int, list[int]] = {}
        for (level, index), at in self._changed.items():
            if at < cycle <= at + self.cycles:
                resting.setdefault(level, []).append(index)
        return {level: np.array(sorted(index), np.int64) for level, index in resting.items()}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy, for `from_dict`."""
        return {"cycles": self.cycles, "changed": [[*node, at] for node, at in sorted(self._changed.items())]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cooldown:
        """Restore what `to_dict` gave. Raises `InputError` for anything else."""
        try:
            restored = cls(data["cycles"])
            restored._changed = {(int(level), int(index)): int(at) for level, index, at in data["changed"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"cooldown: expected what Cooldown.to_dict gave, got {data!r}") from error
        return restored
