"""The leaves of a layout: the units that focus expands and collapses.

A leaf is a gist, or a full block of K tokens whose level-1 node is stored, which it is scored by. Tokens of other
blocks are the ragged tail: they can be neither expanded nor collapsed and are no leaf.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .view import Ints

if TYPE_CHECKING:
    from mc_runtime.timeline import Entries


@dataclass(frozen=True)
class Leaves:
    """n leaves in timeline order, of a layout of `entries` entries that ends `length` tokens into the history.

    [n] each, int64. rank: of the first entry; slots: entries. levels, index: leaf i is gist (levels[i], index[i]), or
    at level 0 the tokens of block index[i]. starts, spans: first token and number of tokens covered.
    """

    rank: Ints
    slots: Ints
    levels: Ints
    index: Ints
    starts: Ints
    spans: Ints
    entries: int
    length: int
    block_size: int

    def __len__(self) -> int:
        return len(self.rank)

    def parents(self) -> tuple[Ints, Ints]:
        """[n], [n]: level and index of the node that each leaf collapses into."""
        return parents_of(self.levels, self.index, self.block_size)


def parents_of(levels: Ints, index: Ints, block_size: int) -> tuple[Ints, Ints]:
    """Level and index of the node that leaves collapse into; a block of tokens has its own level-1 node."""
    return levels + 1, np.where(levels > 0, index // block_size, index)


def find_leaves(entries: Entries, stored_blocks: int, length: int) -> Leaves:
    """stored_blocks: level-1 nodes that the tree holds; length: tokens of history."""
    size = entries.block_size
    levels = entries.levels.astype(np.int64)
    gists, tokens = (levels > 0).nonzero()[0], (levels == 0).nonzero()[0]
    blocks, first, counts = np.unique(entries.index[tokens] // size, return_index=True, return_counts=True)
    full = (counts == size) & (blocks < stored_blocks)
    rank = np.concatenate((gists, tokens[first[full]]))
    order = np.argsort(rank)
    rank = rank[order]
    index = np.concatenate((entries.index[gists], blocks[full]))[order]
    levels = levels[rank]
    spans = np.int64(size) ** np.maximum(levels, 1)
    slots = np.where(levels > 0, 1, size)
    return Leaves(rank, slots, levels, index, index * spans, spans, len(entries), length, size)
