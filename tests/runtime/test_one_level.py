"""The allocator where only what stands in the layout may change, by one level: the oracle of `mc_kernels.refocus_`."""

from __future__ import annotations

import numpy as np
import pytest

from mc_runtime.focus.allocator import FocusParams, layout_entries
from mc_runtime.focus.one_level import expanded_by, one_level
from mc_runtime.timeline import Entries

COUNTS = (18, 8, 4, 2)  # K = 2: nodes of 16 tokens, two more
FREE = FocusParams(min_gain=0.0, hysteresis=0.0)


def entries(expanded: dict[int, list[int]]) -> Entries:
    nodes = {level: np.array(index, np.int64) for level, index in expanded.items()}
    return Entries(*layout_entries(2, COUNTS, nodes), 2)


def scores(layout: Entries, values: dict[tuple[int, int], tuple[float, float]]) -> np.ndarray:
    nodes = zip(layout.levels.tolist(), layout.index.tolist(), strict=True)
    return np.array([values.get(node, (0.0, 0.0)) for node in nodes])


def everything(level: int, index: int) -> bool:
    return True


@pytest.mark.parametrize("expanded", [{}, {3: [1]}, {3: [0, 1], 2: [1, 2], 1: [2, 5]}])
def test_expanded_nodes_follow_from_entries(expanded: dict[int, list[int]]) -> None:
    found = expanded_by(entries(expanded), COUNTS)
    assert {level: index.tolist() for level, index in found.items() if len(index)} == expanded


def test_a_gist_opens_by_one_level() -> None:
    """A child that is worth more than its parent is not looked for below it."""
    layout = entries({3: [0]})
    chosen = one_level(layout, COUNTS, scores(layout, {(2, 1): (0.5, 0.0)}), everything, 18, FREE)
    assert (2, 1) in chosen.expand
    assert all(level >= 2 for level, _ in chosen.expand)


def test_what_is_not_at_hand_stays_closed() -> None:
    layout = entries({3: [0]})
    worth = scores(layout, {(2, 0): (0.5, 0.0), (2, 1): (0.4, 0.0)})
    params = FocusParams(min_gain=0.1, hysteresis=0.0)
    chosen = one_level(layout, COUNTS, worth, lambda level, index: (level, index) == (2, 1), 18, params)
    assert chosen.expand == [(2, 1)]


def test_a_parent_whose_child_may_open_is_not_closed() -> None:
    """Even where the budget then cannot be kept."""
    layout = entries({3: [0, 1]})
    worth = scores(layout, {(2, 0): (0.5, 0.1), (2, 1): (0.0, 0.1), (2, 2): (0.0, 5.0), (2, 3): (0.0, 5.0)})
    params = FocusParams(min_gain=0.1, hysteresis=0.0)
    assert len(layout) == 6
    chosen = one_level(layout, COUNTS, worth, everything, 5, params)
    assert (chosen.expand, chosen.collapse, chosen.slots) == ([], [(3, 1)], 5)
    chosen = one_level(layout, COUNTS, worth, everything, 0, params)
    assert (chosen.expand, chosen.collapse, chosen.slots) == ([], [(3, 1)], 5)


def test_pinned_and_resting_nodes_stay() -> None:
    layout = entries({3: [0, 1]})
    worth, params = scores(layout, {}), FocusParams(min_gain=0.1, hysteresis=0.0)
    assert len(one_level(layout, COUNTS, worth, everything, 4, params).collapse) == 2
    assert one_level(layout, COUNTS, worth, everything, 4, params, pinned=[(0, 1)]).collapse == [(3, 1)]
    resting = {3: np.array([1])}
    assert one_level(layout, COUNTS, worth, everything, 4, params, resting=resting).collapse == [(3, 0)]
