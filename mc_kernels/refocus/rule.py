"""The rule of a refocus in numpy: which gists open and which groups of siblings close. The contract: `op.refocus_`.

It is what the allocator (`mc_runtime.focus.allocator`) decides where only these may change; tests compare the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .state import RefocusRule

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

TIE = 1e-9
"""Nats: the scale on which ties are broken."""
MOST_NATS = 1e3
"""A score is clipped to it."""


@dataclass(frozen=True)
class Layout:
    """N entries in timeline order, and what is known of them. levels, index, born [N]; scores [N, 2] fp32 by rank.
    cycle: the one that decides. counts: tokens, then nodes of each level. pinned [P, 2] token ranges. keys, rows [T]:
    the store's."""

    levels: Ints
    index: Ints
    born: Ints
    scores: npt.NDArray[np.float32]
    cycle: int
    counts: Ints
    pinned: Ints
    keys: Ints
    rows: Ints


@dataclass(frozen=True)
class Decision:
    """opened: ranks of the gists that open; rows: of their first children in the store. closed: ranks of the first
    entries of the groups that close. wanted: keys of gists that are not in the store. All ascending."""

    opened: Ints
    rows: Ints
    closed: Ints
    wanted: Ints


def _places(x: Layout, k: int, levels: Ints, index: Ints) -> Floats:
    """The ends of nodes' spans as shares of the history."""
    shares = np.array([k**level / max(int(x.counts[0]), 1) for level in range(int(levels.max(initial=0)) + 1)])
    return (index + 1) * shares[levels]


def _rests(x: Layout, rule: RefocusRule, changed: Ints) -> Bools:
    resting: Bools = (changed > 0) & (changed < x.cycle) & (x.cycle <= changed + rule.cooldown)
    return resting


def _groups(x: Layout, rule: RefocusRule, opens: Bools) -> Ints:
    """Ranks at which a complete group of siblings begins that may close."""
    k, n = rule.block_size, len(x.levels)
    start = np.flatnonzero((x.index % k == 0) & (np.arange(n) + k <= n))
    last = start + k - 1
    start = start[(x.levels[last] == x.levels[start]) & (x.index[last] == x.index[start] + k - 1)]
    level, parent = x.levels[start] + 1, x.index[start] // k
    stored = np.concatenate((x.counts, np.zeros(int(level.max(initial=0)) + 1, np.int64)))
    free = (parent < stored[level]) & ~_rests(x, rule, x.born[start])
    span = np.int64(k) ** level
    for first, stop in x.pinned.tolist():
        free &= (first >= stop) | (first >= (parent + 1) * span) | (stop <= parent * span)
    asked = np.concatenate(([0], np.cumsum(opens)))
    return start[free & (asked[start + k] == asked[start])]


def decide(x: Layout, rule: RefocusRule) -> Decision:
    """What opens and what closes. O(N log N)."""
    k = rule.block_size
    nats = np.nan_to_num(x.scores.astype(np.float64), nan=0.0).clip(-MOST_NATS, MOST_NATS)
    gain = nats[:, 0] - rule.min_gain + 0.5 * TIE * _places(x, k, x.levels, x.index)
    asks = (x.levels > 0) & ~_rests(x, rule, -x.born) & (gain > 0)
    keys = x.index * np.int64(k) ** x.levels * 64 + x.levels
    at = x.keys.searchsorted(keys)
    there = np.concatenate((x.keys, [-1]))[at] == keys
    opens = np.flatnonzero(asks & there)
    groups = _groups(x, rule, asks & there)

    level, parent = x.levels[groups], x.index[groups] // k
    cost = np.zeros(len(groups))
    for child in range(k):  # one after the other: a sum of another order may round otherwise
        cost = cost + np.where((level > 0) | (child == 0), nats[groups + child, 1], 0.0)
    spare = cost + (rule.hysteresis - rule.min_gain)
    tie = 2 + spare / (1 + np.abs(spare)) + 0.5 * _places(x, k, level + 1, parent)
    kept = np.maximum(spare, 0.0) + TIE * tie

    ranks, weights = np.concatenate((opens, groups)), np.concatenate((gain[opens], kept))
    order = np.lexsort((ranks, weights))[::-1]  # heaviest first, of equal ones the later
    is_open = order < len(opens)
    room = (rule.budget - len(x.levels)) // (k - 1)
    units = max(room + len(groups), 0)
    n_open, n_close = int(is_open[:units].sum()), int((~is_open[units:]).sum())
    if rule.max_edits is not None and n_open + n_close > rule.max_edits:
        forced, free = min(max(-room, 0), len(groups)), max(room, 0)
        left = max(rule.max_edits - forced, 0)
        n_open = min(left if left <= free else (left + free) // 2, n_open)
        n_close = forced + max(n_open - free, 0)
    opened = np.sort(ranks[order[is_open][:n_open]])
    shut = order[~is_open]
    return Decision(opened, x.rows[at[opened]], np.sort(ranks[shut[len(shut) - n_close :]]), keys[asks & ~there])
