"""The shape of the tree as the focus allocator sees it: counts of stored nodes, cuts, and the forest of candidates.

A node (level L >= 1, index i) covers the tokens [i*K**L, (i+1)*K**L). `counts[0]` is the number of tokens of the
history, `counts[L]` the number of nodes stored at level L; they are the nodes 0 .. counts[L]-1. A layout is described
by the set of its *expanded* nodes, those whose span is shown finer than by themselves: a mapping from level to sorted
int64 indices, closed upward (the stored ancestors of an expanded node are expanded). Levels that are missing from a
mapping are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import InputError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Positions = NDArray[np.intp]
NodeSet = Mapping[int, Ints]

EMPTY: Ints = np.zeros(0, np.int64)

MAX_UTILITY = 1e9
"""Nats. Far above any real one; keeps sums of weights finite and exact enough."""


def check_counts(block_size: int, counts: Sequence[int]) -> None:
    """Raise `InputError` unless `counts` describes a tree whose nodes have `block_size` children each."""
    if not isinstance(block_size, int | np.integer) or block_size < 2:
        raise InputError(f"block_size: expected an integer of at least 2, got {block_size!r}")
    if len(counts) == 0:
        raise InputError("counts: expected the number of tokens and of the nodes of each level, got nothing")
    for level, count in enumerate(counts):
        if not isinstance(count, int | np.integer) or count < 0:
            raise InputError(f"counts[{level}]: expected a non-negative integer, got {count!r}")
        if level and count > counts[level - 1] // block_size:
            most = counts[level - 1] // block_size
            raise InputError(f"counts[{level}]: expected at most {most} complete nodes, got {count}")


def check_nodes(name: str, counts: Sequence[int], nodes: NodeSet) -> dict[int, Ints]:
    """The non-empty levels of `nodes` as int64 arrays; `InputError` unless each is sorted, unique and stored."""
    checked: dict[int, Ints] = {}
    if not isinstance(nodes, Mapping):
        raise InputError(f"{name}: expected a mapping from level to indices, got {type(nodes).__name__}")
    for level, given in nodes.items():
        if not isinstance(level, int | np.integer):
            raise InputError(f"{name}: expected levels as keys, got {level!r}")
        index = np.asarray(given)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            kind = f"{index.dtype} of shape {index.shape}"
            raise InputError(f"{name}[{level}]: expected a one-dimensional integer array, got {kind}")
        if index.size == 0:
            continue
        stored = counts[level] if 1 <= level < len(counts) else 0
        index = index.astype(np.int64, copy=False)
        if not bool((index[1:] > index[:-1]).all()):
            raise InputError(f"{name}[{level}]: expected sorted indices without repeats, got others")
        if index[0] < 0 or index[-1] >= stored:
            worst = int(index[0] if index[0] < 0 else index[-1])
            raise InputError(f"{name}[{level}]: expected indices of the {stored} stored nodes, got {worst}")
        checked[level] = index
    return checked


def check_closed(name: str, block_size: int, counts: Sequence[int], nodes: NodeSet) -> None:
    """Raise `InputError` unless the stored parent of every node of `nodes` is in `nodes`."""
    for level in range(1, len(counts) - 1):
        index = nodes.get(level, EMPTY)
        parents = index[: index.searchsorted(counts[level + 1] * block_size)] // block_size
        missing = parents[~is_member(parents, nodes.get(level + 1, EMPTY))]
        if missing.size:
            raise InputError(
                f"{name}[{level}]: expected every stored parent to be expanded too, got children of the "
                f"unexpanded node ({level + 1}, {int(missing[0])})"
            )


def check_utility(counts: Sequence[int], utility: Mapping[int, tuple[Ints, Floats]]) -> tuple[dict[int, Ints], Floats]:
    """The nodes with a utility, and their utilities in the order of `Forest.locate`; `InputError` if unusable."""
    for level, pair in utility.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise InputError(f"utility[{level}]: expected a pair (indices, nats), got {type(pair).__name__}")
    indices = check_nodes("utility", counts, {level: pair[0] for level, pair in utility.items()})
    nats = [np.zeros(0)]
    for level in sorted(utility):
        values = np.asarray(utility[level][1])
        if values.dtype.kind not in "fiu":
            raise InputError(f"utility[{level}]: expected nats as floats, got {values.dtype}")
        size = indices[level].size if level in indices else 0
        if values.shape != (size,):
            raise InputError(f"utility[{level}]: expected {size} values, one per index, got shape {values.shape}")
        if not bool((np.abs(values) <= MAX_UTILITY).all()):  # catches NaN too
            raise InputError(f"utility[{level}]: expected finite nats of at most {MAX_UTILITY:g}, got others")
        nats.append(values.astype(np.float64, copy=False))
    return indices, np.concatenate(nats)


def is_member(index: Ints, of: Ints) -> Bools:
    """Which of `index` occur in the sorted unique `of`."""
    if of.size == 0:
        return np.zeros(index.shape, np.bool_)
    found: Bools = of[np.minimum(of.searchsorted(index), of.size - 1)] == index
    return found


def base_slots(block_size: int, counts: Sequence[int]) -> int:
    """Slots of the coarsest tiling: one per stored node without a stored parent, one per token under no stored node."""
    check_counts(block_size, counts)
    parents = [*counts[1:], 0]
    return int(sum(count - block_size * above for count, above in zip(counts, parents, strict=True)))


def coarsest_cut(block_size: int, counts: Sequence[int]) -> tuple[NDArray[np.int8], Ints]:
    """The entries of the coarsest tiling, as `layout_entries` gives them for no expanded node."""
    return layout_entries(block_size, counts, {})


def layout_entries(block_size: int, counts: Sequence[int], expanded: NodeSet) -> tuple[NDArray[np.int8], Ints]:
    """The entries of a layout in timeline order: `(levels [N] int8, index [N] int64)`.

    The entries are the stored nodes that are not expanded and whose parent is expanded or not stored, and, at level 0,
    every token of an expanded level-1 node or under no stored node. Their spans tile [0, counts[0]) without gap or
    overlap. Raises `InputError` if `expanded` is not a set of stored nodes that is closed upward.
    """
    check_counts(block_size, counts)
    nodes = check_nodes("expanded", counts, expanded)
    check_closed("expanded", block_size, counts, nodes)
    levels, index, start = [], [], []
    siblings = np.arange(block_size)
    for level, count in enumerate(counts):
        above = counts[level + 1] if level + 1 < len(counts) else 0
        children = (nodes.get(level + 1, EMPTY)[:, None] * block_size + siblings).ravel()
        shown = np.concatenate([children, np.arange(above * block_size, count)])
        shown = shown[~is_member(shown, nodes.get(level, EMPTY))]
        levels.append(np.full(shown.size, level, np.int8))
        index.append(shown)
        start.append(shown * block_size**level)
    order = np.argsort(np.concatenate(start), kind="stable")  # starts are distinct; the parts are sorted runs
    return np.concatenate(levels)[order], np.concatenate(index)[order]


def pinned_nodes(block_size: int, counts: Sequence[int], ranges: Sequence[tuple[int, int]]) -> dict[int, Ints]:
    """The stored nodes that intersect the token ranges [start, stop): those to expand to show the ranges as tokens.

    Returns sorted indices for every level above 0 (closed upward). An empty range pins nothing. Raises `InputError` for
    a range outside of [0, counts[0]].
    """
    check_counts(block_size, counts)
    for pair in ranges:
        whole = len(pair) == 2 and all(isinstance(bound, int | np.integer) for bound in pair)
        if not whole or not 0 <= pair[0] <= pair[1] <= counts[0]:
            raise InputError(f"pinned: expected token ranges (start, stop) within [0, {counts[0]}], got {tuple(pair)}")
    nodes: dict[int, Ints] = {}
    for level in range(1, len(counts)):
        span = block_size**level
        runs = [
            np.arange(start // span, min((stop - 1) // span + 1, counts[level]))
            for start, stop in ranges
            if start < stop
        ]
        nodes[level] = sorted_union(runs)
    return nodes


def sorted_union(parts: Sequence[Ints]) -> Ints:
    """The union of arrays of indices, sorted and without repeats. Fast when each part is sorted."""
    filled = [part for part in parts if part.size]
    if len(filled) < 2:
        return filled[0] if filled else EMPTY
    merged = np.sort(np.concatenate(filled), kind="stable")  # stable: merges the sorted runs instead of sorting anew
    return merged[np.concatenate([[True], merged[1:] != merged[:-1]])]


@dataclass(frozen=True)
class Forest:
    """Candidate nodes, closed upward, in one flat order: level 1 first, by index within a level. N nodes in all.

    A link `(a, b, starts, up)` joins a level to the one above, lowest level first: its nodes a .. b-1 have a parent,
    those of one parent are neighbours, their runs begin at `starts` (relative to a), and `up` are the flat positions of
    the parents, one a run.
    """

    levels: tuple[slice, ...]  # levels[L-1]: the flat positions of level L
    index: Ints  # [N]
    parent: Positions  # [N], flat position; -1 without a stored parent
    links: tuple[tuple[int, int, Positions, Positions], ...]

    @classmethod
    def build(cls, block_size: int, counts: Sequence[int], seeds: Sequence[NodeSet]) -> Forest:
        """The forest of all nodes in `seeds` (each checked by `check_nodes`) and their stored ancestors."""
        rows: list[Ints] = []
        runs: list[tuple[Positions, Ints]] = []
        parents = EMPTY
        for level in range(1, len(counts)):
            row = sorted_union([*(seed[level] for seed in seeds if level in seed), parents])
            above = counts[level + 1] if level + 1 < len(counts) else 0
            of = row[: row.searchsorted(above * block_size)] // block_size
            starts = np.flatnonzero(np.concatenate([[True], of[1:] != of[:-1]])) if of.size else np.zeros(0, np.intp)
            parents = of[starts]
            rows.append(row)
            runs.append((starts, of))
        ends = np.cumsum([0, *(row.size for row in rows)]).tolist()
        parent = np.full(ends[-1], -1, np.intp)
        links = []
        for i in range(len(rows) - 1):
            starts, of = runs[i]
            if of.size:
                up = ends[i + 1] + rows[i + 1].searchsorted(of[starts])
                parent[ends[i] : ends[i] + of.size] = np.repeat(up, np.diff(starts, append=of.size))
                links.append((ends[i], ends[i] + of.size, starts, up))
        levels = tuple(slice(a, b) for a, b in pairwise(ends))
        return cls(levels, np.concatenate(rows) if rows else EMPTY, parent, tuple(links))

    def locate(self, nodes: NodeSet) -> Positions:
        """The flat positions of those of `nodes` that are candidates, in the order of levels 1, 2, ..."""
        found = [np.zeros(0, np.intp)]
        for level, part in enumerate(self.levels, start=1):
            index, row = nodes.get(level, EMPTY), self.index[part]
            if index.size and row.size:
                at = row.searchsorted(index)
                found.append(part.start + at[is_member(index, row)])
        return np.concatenate(found)

    def mask(self, nodes: NodeSet) -> Bools:
        """[N]: which candidates are in `nodes`."""
        chosen = np.zeros(self.index.size, np.bool_)
        chosen[self.locate(nodes)] = True
        return chosen

    def close_upward(self, chosen: Bools) -> Bools:
        """[N]: `chosen` and the ancestors of its nodes."""
        closed = chosen.copy()
        for a, b, _, _ in self.links:
            closed[self.parent[a:b][closed[a:b]]] = True
        return closed
