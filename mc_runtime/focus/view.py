"""What a focus policy sees, and the form in which it answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from mc_runtime.layout import Layout
    from mc_runtime.retrieval import BlockIndex

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
# level -> (sorted unique node indices, nats gained by having that node expanded). What is missing is 0.
Utilities = dict[int, tuple[Ints, Floats]]


@dataclass(frozen=True)
class FocusView:
    """The state that a refocus decides on.

    context: the Working Context before any edit. expanded: its expanded nodes, extended to nodes new in the tree.
    query: text that says what is wanted now (the turn's prompt and the newest generated text); may be empty.
    mass: [L, N] attention that the newest tokens paid to each entry, by rank, summed over heads and queries; or None.
    retrieval: BM25 over the tree's blocks.
    recent_start: first token of the recent text, the present turn included, that is at full detail whatever is decided.
    asked: a user's turn is under way.
    """

    context: Layout
    expanded: dict[int, Ints]
    query: str
    mass: Floats | None
    retrieval: BlockIndex
    recent_start: int
    asked: bool = False


class FocusPolicy(Protocol):
    """Says what having a node expanded is worth.

    `needs_mass`: whether the view must bring attention mass, which costs a summation in every forward.
    """

    needs_mass: bool

    def utilities(self, view: FocusView) -> Utilities: ...


def utilities_of(level: Ints, index: Ints, nats: Floats) -> Utilities:
    """Collect per-node values; those of the same node are added."""
    result: Utilities = {}
    for one in np.unique(level):
        nodes, inverse = np.unique(index[level == one], return_inverse=True)
        summed = np.bincount(inverse, weights=nats[level == one], minlength=len(nodes)).astype(np.float64)
        result[int(one)] = (nodes.astype(np.int64), summed)
    return result


def add_utilities(parts: Iterable[tuple[float, Utilities]]) -> Utilities:
    """Weighted sum."""
    per_level: dict[int, list[tuple[Ints, Floats]]] = {}
    for weight, part in parts:
        for level, (index, nats) in part.items():
            per_level.setdefault(level, []).append((index, weight * nats))
    result: Utilities = {}
    for level, pairs in per_level.items():
        index = np.concatenate([i for i, _ in pairs])
        nats = np.concatenate([n for _, n in pairs])
        result |= utilities_of(np.full(len(index), level), index, nats)
    return result
