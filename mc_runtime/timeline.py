"""Entries of a Working Context in timeline order, and what changes between two such lists."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mc_kernels import Edit


@dataclass(frozen=True)
class Entries:
    """N entries in timeline order. levels [N] int8, index [N] int64: entry i is node (levels[i], index[i])."""

    levels: NDArray[np.int8]
    index: NDArray[np.int64]
    block_size: int

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def spans(self) -> NDArray[np.int64]:
        """[N] tokens covered by each entry."""
        return np.int64(self.block_size) ** self.levels.astype(np.int64)

    @property
    def starts(self) -> NDArray[np.int64]:
        """[N] first token of each entry; strictly increasing."""
        return self.index * self.spans

    @property
    def keys(self) -> NDArray[np.int64]:
        """[N] what names each entry: its start and its level, which stays far below 64; strictly increasing."""
        return self.starts * 64 + self.levels

    @functools.cached_property
    def stop(self) -> int:
        """Tokens of history that the entries tile: [0, stop)."""
        return (int(self.index[-1]) + 1) * self.block_size ** int(self.levels[-1]) if len(self) else 0

    def token_spans(self) -> list[tuple[int, int]]:
        """Spans [start, stop) of the history that stand here as tokens, in order; neighbours are one span."""
        index = self.index[self.levels == 0]
        if not len(index):
            return []
        cuts = (np.diff(index) != 1).nonzero()[0] + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(index, cuts)]

    def with_tokens(self, count: int) -> Entries:
        """These entries followed by `count` tokens."""
        stop = self.stop
        return Entries(
            np.concatenate((self.levels, np.zeros(count, np.int8))),
            np.concatenate((self.index, np.arange(stop, stop + count))),
            self.block_size,
        )

    def with_children(self, ranks: NDArray[np.int64]) -> Entries:
        """These entries, with the K children of each gist at `ranks` in its place."""
        counts = np.ones(len(self), np.int64)
        counts[ranks] = self.block_size
        opened = np.repeat(counts > 1, counts)
        levels, index = np.repeat(self.levels, counts), np.repeat(self.index, counts)
        child = np.arange(len(levels)) - np.repeat(np.cumsum(counts) - counts, counts)
        return Entries(
            np.where(opened, levels - 1, levels).astype(np.int8),
            np.where(opened, index * self.block_size + child, index),
            self.block_size,
        )

    def per_level(self) -> dict[int, int]:
        """Slots used at each level that occurs."""
        levels, counts = np.unique(self.levels, return_counts=True)
        return {int(level): int(count) for level, count in zip(levels, counts, strict=True)}


@dataclass(frozen=True)
class EntryDiff:
    """edits: in ranks of the old entries; inserted: ranks, in the new entries, of those that the old ones lack."""

    edits: list[Edit]
    inserted: NDArray[np.int64]
    removed: NDArray[np.int64]


def diff_entries(old: Entries, new: Entries) -> EntryDiff:
    """What turns one list of entries into another; entries that both have are kept in place."""
    old_keys, new_keys = old.keys, new.keys
    _, a, b = np.intersect1d(old_keys, new_keys, assume_unique=True, return_indices=True)
    a, b = np.sort(a), np.sort(b)
    a_gaps = np.diff(np.concatenate(([-1], a, [len(old)]))) - 1
    b_gaps = np.diff(np.concatenate(([-1], b, [len(new)]))) - 1
    starts = np.concatenate(([0], a + 1))
    changed = ((a_gaps > 0) | (b_gaps > 0)).nonzero()[0]
    edits = [Edit(int(starts[i]), int(a_gaps[i]), int(b_gaps[i])) for i in changed]
    inserted = np.setdiff1d(np.arange(len(new)), b, assume_unique=True)
    removed = np.setdiff1d(np.arange(len(old)), a, assume_unique=True)
    return EntryDiff(edits, inserted.astype(np.int64), removed.astype(np.int64))
