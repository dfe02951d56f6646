"""The allocator on what a device can decide alone: gists that open into children at hand, groups that close.

`mc_kernels.refocus_` decides the same from the same numbers without the host; this is its oracle. What can change is
what stands in the layout: a gist whose children's keys and values are at hand may open, and K leaves of one parent may
close. All other nodes are frozen, so too the parent of a gist that may open. The candidates are then independent of
each other, and one refocus changes each place of the history by one level at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .allocator import TIE, Allocation, FocusParams, FocusProblem, allocate, base_slots, pinned_nodes
from .forest import is_member
from .leaves import Leaves, find_leaves
from .view import Floats, Ints, utilities_of

if TYPE_CHECKING:
    from mc_runtime.timeline import Entries

    from .forest import Bools, NodeSet


def expanded_by(entries: Entries, counts: Sequence[int]) -> dict[int, Ints]:
    """The stored nodes that the layout shows in finer detail: level -> sorted indices."""
    size, expanded = entries.block_size, {}
    for level in range(1, len(counts)):
        finer = entries.levels < level
        above = np.unique(entries.starts[finer] // size**level)
        expanded[level] = above[above < counts[level]]
    return expanded


def one_level(
    entries: Entries,
    counts: Sequence[int],
    scores: Floats,
    at_hand: Callable[[int, int], bool],
    budget: int,
    params: FocusParams,
    *,
    pinned: Sequence[tuple[int, int]] = (),
    resting: NodeSet | None = None,
) -> Allocation:
    """What opens and closes.

    scores: [N, 2] nats by rank: gained by opening an entry, lost by closing its leaf (a block of tokens is one leaf and
    has the score of its first token); finite. at_hand: are the children of gist (level, index) there to be inserted?
    pinned: token ranges of which nothing closes. resting: nodes that may not change. A budget that nothing could keep
    is taken as the least that can be kept.
    """
    size, resting = entries.block_size, resting or {}
    leaves = find_leaves(entries, counts[1] if len(counts) > 1 else 0, counts[0])
    gist, gains = leaves.levels > 0, scores[leaves.rank, 0]
    share = np.array([size**level / max(counts[0], 1) for level in range(len(counts))])
    weight = gains - params.min_gain + 0.5 * TIE * ((leaves.index + 1) * share[leaves.levels])  # as the allocator's
    nodes = zip(leaves.levels.tolist(), leaves.index.tolist(), strict=True)
    there = np.array([level > 0 and at_hand(level, index) for level, index in nodes], np.bool_)
    opens = gist & (weight > 0) & there & ~_in(leaves.levels, leaves.index, resting)

    level, index = leaves.parents()
    closes = _closable(leaves, counts, opens) & ~_in(level, index, resting)
    closes &= ~_in(level, index, pinned_nodes(size, counts, pinned))

    now = expanded_by(entries, counts)
    free = {n: np.unique(index[closes & (level == n)]) for n in now}
    frozen = {n: here[~is_member(here, free[n])] for n, here in now.items()}
    held = sum(len(here) for here in frozen.values())
    problem = FocusProblem(
        block_size=size,
        counts=tuple(counts),
        expanded=now,
        utility=utilities_of(
            np.concatenate((leaves.levels[opens], level[closes])),
            np.concatenate((leaves.index[opens], index[closes])),
            np.concatenate((gains[opens], scores[leaves.rank, 1][closes])),
        ),
        pinned=(),
        budget=max(budget, base_slots(size, counts) + (size - 1) * held),
        frozen=frozen,
    )
    return allocate(problem, params)


def _in(levels: Ints, index: Ints, nodes: NodeSet) -> Bools:
    """Which of the nodes are in the set."""
    found = np.zeros(len(levels), np.bool_)
    for level, members in nodes.items():
        here = levels == level
        found[here] = is_member(index[here], members)
    return found


def _closable(leaves: Leaves, counts: Sequence[int], opens: Bools) -> Bools:
    """Leaves of a stored parent all of whose children are leaves, none of which may open."""
    level, index = leaves.parents()
    closable = np.zeros(len(leaves), np.bool_)
    for n in range(1, len(counts)):
        here = np.flatnonzero((level == n) & (index < counts[n]))
        _, group, members = np.unique(index[here], return_inverse=True, return_counts=True)
        asked = np.bincount(group, weights=opens[here], minlength=len(members))
        whole = (members == (1 if n == 1 else leaves.block_size)) & (asked == 0)
        closable[here] = whole[group]
    return closable
