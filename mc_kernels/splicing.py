"""Plans of a splice: which entries of a cache move where, worked out on the host before anything is written.

An `Edit` speaks of entry *ranks*, the timeline order; a cache speaks of *slots*. In the ordered discipline rank and
slot are the same; in the slots discipline a map (rank to slot, a permutation of 0..length-1) tells them apart.

    ordered   survivors between two edits shift by the sum of (insert - remove) so far: one segment per gap
    slots     new entries fill freed slots, lowest first; if more are removed than inserted, the entries in the last
              slots move down into the holes; if more are inserted, slots length..new_length-1 are appended

Everything is vectorised numpy, without torch: O(edit) for ordered, O(edit) moves and a few O(length) passes over the
map for slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .contracts import describe

Ints = npt.NDArray[np.int64]
DISCIPLINES = ("ordered", "slots")


class Edit(NamedTuple):
    """Replace the `remove` entries from rank `start` on by `insert` new ones; ranks of the state before the splice."""

    start: int
    remove: int
    insert: int


def expand_ranges(starts: Ints, counts: Ints) -> Ints:
    """starts[i], starts[i]+1, ..., starts[i]+counts[i]-1 for each i, concatenated."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def _integer(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {describe(value)}") from None


def _edit_array(edits: Sequence[Edit]) -> Ints:
    if not len(edits):
        return np.zeros((0, 3), dtype=np.int64)
    try:
        table = np.asarray(edits)
    except ValueError:
        table = np.zeros(0)
    if table.ndim != 2 or table.shape[1] != 3 or table.dtype.kind not in "iu":
        raise TypeError(f"edits: expected Edit(start, remove, insert) of integers, got {edits!r}")
    return table.astype(np.int64)


def _check_edits(length: int, table: Ints) -> None:
    start, remove = table[:, 0], table[:, 1]
    negative = np.any(table < 0, axis=1)
    beyond = (start > length) | (remove > length - start)
    previous_end = np.concatenate((np.zeros(1, np.int64), (start + remove)[:-1]))
    bad = negative | beyond | (start < previous_end)
    if not bad.any():
        return
    i = int(bad.argmax())
    edit = Edit(*(int(x) for x in table[i]))
    if negative[i]:
        why = "expected start, remove and insert >= 0"
    elif beyond[i]:
        why = f"expected start + remove <= length = {length}"
    else:
        why = f"expected start >= {int(previous_end[i])}, the end of the edit before (sorted and disjoint)"
    raise ValueError(f"edits[{i}]: {why}, got {edit}")


def _slot_array(slots: Any, length: int) -> Ints:
    if slots is None:
        return np.arange(length, dtype=np.int64)
    array = np.asarray(slots)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"slots: expected integers, got dtype {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"slots: expected shape [{length}] (one slot per entry), got {list(array.shape)}")
    array = array.astype(np.int64)
    seen = np.zeros(length, dtype=bool)
    if length and (array.min() < 0 or array.max() >= length):
        raise ValueError(f"slots: expected a permutation of 0..{length - 1}, got {array.min()}..{array.max()}")
    seen[array] = True
    if not seen.all():
        raise ValueError(f"slots: expected a permutation of 0..{length - 1}, slot {int(seen.argmin())} is missing")
    return array


def _runs(source: Ints, destination: Ints) -> Ints:
    """(source, destination, count) [n, 3] of the maximal runs in which both grow by one."""
    if not source.size:
        return np.zeros((0, 3), dtype=np.int64)
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(destination) != 1)) + 1
    first = np.concatenate((np.zeros(1, np.int64), breaks))
    count = np.diff(np.concatenate((first, [source.size])))
    return np.stack((source[first], destination[first], count), axis=1)


def _ordered_segments(length: int, table: Ints) -> tuple[Ints, Ints]:
    """Moving segments in an order in which they can be executed one by one, and segments that stay."""
    start, remove, insert = table.T
    zero = np.zeros(1, np.int64)
    source = np.concatenate((zero, start + remove))
    count = np.concatenate((start, [length])) - source
    shift = np.concatenate((zero, np.cumsum(insert - remove)))
    segments = np.stack((source, source + shift, count), axis=1)
    some = count > 0
    left, right = segments[some & (shift < 0)], segments[some & (shift > 0)]
    return np.concatenate((left, right[::-1])), segments[some & (shift == 0)]


@dataclass(frozen=True, eq=False)
class SplicePlan:
    """A validated splice of one sequence. All arrays are int64; treat them as read-only.

    length, new_length: entries before and after. Slots [0, length) are in use before, [0, new_length) after.
    capacity: slots there are.
    discipline: "ordered" or "slots".
    edits: [E, 3] (start, remove, insert).
    segments: [n, 3] (source slot, destination slot, count) of the survivors that move. Executed one after the other
        each with memmove semantics they are safe in place: left-moving ones in ascending order, then right-moving ones
        in descending order (left- and right-moving ones never touch each other's entries). In the slots discipline
        all sources lie beyond all destinations, so any order will do.
    stays: [m, 3] (slot, slot, count) of the survivors that keep their slot.
    insert_slots: [M] slot of each inserted entry, in timeline order over all edits. Write them after the moves.
    """

    length: int
    new_length: int
    capacity: int
    discipline: str
    edits: Ints
    segments: Ints
    stays: Ints
    insert_slots: Ints
    _slots: Ints | None = field(default=None, repr=False)
    _new_slots: Ints | None = field(default=None, repr=False)

    @classmethod
    def from_edits(
        cls,
        length: int,
        edits: Sequence[Edit],
        *,
        capacity: int,
        discipline: str = "ordered",
        slots: Sequence[int] | Ints | None = None,
    ) -> SplicePlan:
        """Validate `edits` (sorted by start, disjoint, in range, the result within `capacity`) and plan the moves.

        slots: rank-to-slot map before the splice, [length], a permutation of 0..length-1; slots discipline only,
            default identity.

        Raises TypeError for what is not an integer, ValueError (naming the edit) for everything else.
        """
        if discipline not in DISCIPLINES:
            raise ValueError(f"discipline: expected one of {', '.join(DISCIPLINES)}, got {discipline!r}")
        length, capacity = _integer("length", length), _integer("capacity", capacity)
        if not 0 <= length <= capacity:
            raise ValueError(f"length: expected 0 <= length <= capacity = {capacity}, got {length}")
        if slots is not None and discipline == "ordered":
            raise ValueError("slots: expected None in the ordered discipline (slot = rank), got a map")
        table = _edit_array(edits)
        _check_edits(length, table)
        start, remove, insert = table.T
        # An edit that inserts more than fits is beyond it whatever follows, and a sum of such ones may wrap around.
        too_many = insert > capacity
        grown = length + np.cumsum(np.where(too_many, capacity + 1, insert) - remove)
        new_length = int(grown[-1]) if len(table) else length
        if new_length > capacity:
            i = int((too_many if too_many.any() else grown > capacity).argmax())
            edit = Edit(*(int(x) for x in table[i]))
            total = length + sum(more - less for _, less, more in table.tolist())
            raise ValueError(
                f"edits[{i}]: expected at most capacity = {capacity} entries after the splice, got {total}; "
                f"{edit} is the first beyond it"
            )
        insert_ranks = expand_ranges(start + np.cumsum(insert - remove) - (insert - remove), insert)
        if discipline == "ordered":
            segments, stays = _ordered_segments(length, table)
            return cls(length, new_length, capacity, discipline, table, segments, stays, insert_ranks)
        before = _slot_array(slots, length)
        keep = np.ones(length, dtype=bool)
        keep[expand_ranges(start, remove)] = False
        freed = np.sort(before[~keep])
        holes = np.concatenate((freed[freed < new_length], np.arange(length, new_length, dtype=np.int64)))
        insert_slots, moved_to = holes[: insert_ranks.size], holes[insert_ranks.size :]
        survivors = before[keep]
        beyond = survivors >= new_length
        moved_from = np.sort(survivors[beyond])
        forward = np.zeros(max(length - new_length, 0), dtype=np.int64)
        forward[moved_from - new_length] = moved_to
        survivors[beyond] = forward[survivors[beyond] - new_length]
        after = np.empty(new_length, dtype=np.int64)
        inserted = np.zeros(new_length, dtype=bool)
        inserted[insert_ranks] = True
        after[insert_ranks] = insert_slots
        after[~inserted] = survivors
        limit = min(length, new_length)
        edges = np.concatenate(([-1], holes[holes < limit], [limit]))
        first, count = edges[:-1] + 1, np.diff(edges) - 1
        stays = np.stack((first, first, count), axis=1)[count > 0]
        return cls(
            length, new_length, capacity, discipline, table, _runs(moved_from, moved_to), stays, insert_slots, before,
            after,
        )  # fmt: skip

    @property
    def n_insert(self) -> int:
        return int(self.insert_slots.shape[0])

    @cached_property
    def slots(self) -> Ints:
        """[length] slot of each entry by rank, before."""
        return np.arange(self.length) if self._slots is None else self._slots

    @cached_property
    def new_slots(self) -> Ints:
        """[new_length] slot of each entry by rank, after."""
        return np.arange(self.new_length) if self._new_slots is None else self._new_slots

    @cached_property
    def moves(self) -> Ints:
        """[n, 2] (source slot, destination slot) of every survivor that moves, in the order of `segments`."""
        source, destination, count = self.segments.T
        return np.stack((expand_ranges(source, count), expand_ranges(destination, count)), axis=1)

    @cached_property
    def removed_slots(self) -> Ints:
        """Slot of each removed entry, in timeline order over all edits."""
        start, remove, _ = self.edits.T
        return self.slots[expand_ranges(start, remove)]

    @cached_property
    def insert_ranks(self) -> Ints:
        """[M] rank after the splice of each inserted entry."""
        start, remove, insert = self.edits.T
        shift = np.cumsum(insert - remove) - (insert - remove)
        return expand_ranges(start + shift, insert)

    @cached_property
    def rank_map(self) -> Ints:
        """[length] rank after the splice of each entry by its rank before; -1 where it is removed."""
        start, remove, insert = self.edits.T
        zero = np.zeros(1, np.int64)
        end = np.concatenate((start + remove, [self.length]))
        first = np.concatenate((zero, start + remove))
        shift = np.concatenate((zero, np.cumsum(insert - remove)))
        ranks = np.arange(self.length, dtype=np.int64) + np.repeat(shift, end - first)
        ranks[expand_ranges(start, remove)] = -1
        return ranks
