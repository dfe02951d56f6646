"""Oracle of `refocus_`: the rule of `rule.py`, then what `gist_pool`, a plan of the slots discipline and copies make of
it.

    1. decide which gists open and which groups close
    2. plan = SplicePlan of the edits in the slots discipline
    3. children of opened gists come from the store, gists of closed groups are pooled from the cache
    4. entries move, inserted ones are written; ranks, slots and positions follow

All on the host: it waits for the device and copies back, which the other backends do not.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..gist_pool.ref import gist_pool_ref
from ..registry import register
from ..splicing import Edit, Ints, SplicePlan, expand_ranges
from .rule import Decision, Layout, decide
from .state import Numbers, RefocusRule


def _numpy(x: Tensor) -> Ints:
    return x.cpu().to(torch.int64).numpy()


def _inserted(k: int, what: Decision, is_open: Ints, layout: Layout) -> tuple[Ints, Ints, Ints]:
    """Levels, indices and sources of the inserted entries, in timeline order. A source is a row of the store, or
    -1 - g: the gist of the g-th closed group."""
    ranks = np.empty(len(is_open), np.int64)
    ranks[is_open > 0], ranks[is_open == 0] = what.opened, what.closed
    count = np.where(is_open > 0, k, 1)
    child = expand_ranges(np.zeros(len(count), np.int64), count)
    source = np.empty(len(ranks), np.int64)
    source[is_open > 0], source[is_open == 0] = what.rows, -1 - np.arange(len(what.closed))
    opened = np.repeat(is_open > 0, count)
    level, index = np.repeat(layout.levels[ranks], count), np.repeat(layout.index[ranks], count)
    return (
        np.where(opened, level - 1, level + 1),
        np.where(opened, index * k + child, index // k),
        np.repeat(source, count) + np.where(opened, child, 0),
    )


def _pool(x: tuple[Tensor, Tensor], children: Ints, levels: Ints, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Gists [L, Hkv, g, D] of the groups in the slots `children` [g, K]."""
    groups = [y[:, :, torch.from_numpy(children).to(y.device)] for y in x]
    gists = tuple(y[..., 0, :].clone() for y in groups)
    for level in np.unique(levels).tolist():
        which = torch.from_numpy(np.flatnonzero(levels == level)).to(gists[0].device)
        at = 4 * (min(level, len(weights) // 4) - 1)
        pooled = gist_pool_ref(*(y[:, :, which] for y in groups), *weights[at : at + 4])
        for gist, new in zip(gists, pooled, strict=True):
            gist[:, :, which] = new[..., 0, :]
    return gists[0], gists[1]


def _put(to: Tensor, values: Ints) -> None:
    """The first rows of a list."""
    rows = torch.from_numpy(np.ascontiguousarray(values[: to.shape[0]])).to(to)
    to[: rows.shape[0]] = rows


@register("refocus_", "ref")
def refocus_ref(
    k: Tensor, v: Tensor, levels: Tensor, index: Tensor, slots: Tensor, born: Tensor, pos: Tensor, bias: Tensor | None,
    numbers: Tensor, edits: Tensor, inserted: Tensor, moves: Tensor, children: Tensor, wanted: Tensor, k_store: Tensor,
    v_store: Tensor, store_keys: Tensor, store_rows: Tensor, scores: Tensor, counts: Tensor, pinned: Tensor,
    weights: list[Tensor], block_size: int, budget: int, cooldown: int, max_edits: int, min_gain: float,
    hysteresis: float, gist_bias: float,
) -> None:  # fmt: skip
    """See `op.py` for the arguments."""
    rule = RefocusRule(
        block_size, budget, min_gain, hysteresis, cooldown, None if max_edits < 0 else max_edits, gist_bias
    )
    n, cycle = (int(x) for x in numbers[:2].tolist())
    cycle += 1
    old_slots = _numpy(slots[:n])
    layout = Layout(
        _numpy(levels[:n]), _numpy(index[:n]), _numpy(born[:n]), scores.cpu().numpy()[old_slots], cycle, _numpy(counts),
        _numpy(pinned), _numpy(store_keys), _numpy(store_rows),
    )  # fmt: skip
    what = decide(layout, rule)
    starts = np.concatenate((what.opened, what.closed))
    order = np.argsort(starts)
    is_open = (order < len(what.opened)).astype(np.int64)
    table = np.stack((starts[order], np.where(is_open, 1, block_size), np.where(is_open, block_size, 1)), axis=1)
    plan = SplicePlan.from_edits(
        n, [Edit(*row) for row in table.tolist()], capacity=levels.shape[0], discipline="slots", slots=old_slots
    )
    new_levels, new_index, source = _inserted(block_size, what, is_open, layout)
    groups = old_slots[what.closed[:, None] + np.arange(block_size)]
    pooled_levels = layout.levels[what.closed] + 1

    if k.numel():
        gists = _pool((k, v), groups, pooled_levels, weights)
        for x, store, gist in ((k, k_store, gists[0]), (v, v_store, gists[1])):
            row = torch.from_numpy(source).to(x.device)
            fresh = torch.empty(*x.shape[:2], len(row), x.shape[3], dtype=x.dtype, device=x.device)
            fresh[:, :, row >= 0] = store[:, :, row[row >= 0]]
            fresh[:, :, row < 0] = gist[:, :, -1 - row[row < 0]]
            from_, to = torch.from_numpy(plan.moves).to(x.device).unbind(1)
            x[:, :, to] = x[:, :, from_]  # indexing copies before it writes
            x[:, :, torch.from_numpy(plan.insert_slots).to(x.device)] = fresh

    kept = np.ones(plan.new_length, np.bool_)
    kept[plan.insert_ranks] = False
    stays = plan.rank_map >= 0
    for state, before, fresh_values in (
        (levels, layout.levels, new_levels),
        (index, layout.index, new_index),
        (born, layout.born, np.where(source >= 0, cycle, -cycle)),
    ):
        after = np.empty(plan.new_length, np.int64)
        after[kept], after[plan.insert_ranks] = before[stays], fresh_values
        _put(state, after)
    if len(table):
        _put(slots, plan.new_slots)
        pos[:n] = -1
        pos[slots[: plan.new_length]] = torch.arange(plan.new_length, device=pos.device)
        if bias is not None:
            bias[:n] = 0.0
            bias[slots[: plan.new_length]] = (levels[: plan.new_length] > 0).float() * gist_bias
    for to, values in (
        (edits, table), (inserted, np.stack((plan.insert_slots, source), axis=1)), (moves, plan.moves),
        (children, groups.ravel()), (wanted, what.wanted),
    ):  # fmt: skip
        _put(to, values)
    new = Numbers(
        plan.new_length, cycle, len(what.opened), len(what.closed), max(plan.new_length - budget, 0), len(plan.moves),
        plan.n_insert, len(what.wanted),
    )  # fmt: skip
    numbers.copy_(torch.tensor(new))
