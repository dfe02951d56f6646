"""`SplicePlan` and `PageTable` as torch's callers see them: the plans of `splicing` in tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .. import splicing
from ..checks import INDEX_DTYPES, check_tensor, describe
from ..splice_checks import plan_offsets
from ..splicing import Edit, Ints


@dataclass(frozen=True, eq=False)
class SplicePlan:
    """A validated splice of one sequence. All tensors are int64 on the CPU and share their memory with `arrays`; treat
    them as read-only.

    length, new_length: entries before and after. Slots [0, length) are in use before, [0, new_length) after.
    capacity: slots there are.
    discipline: "ordered" or "slots".
    edits: [E, 3] (start, remove, insert).
    segments: [n, 3] (source slot, destination slot, count) of the survivors that move, in an order that is safe in
        place, see `splicing.SplicePlan`.
    stays: [m, 3] (slot, slot, count) of the survivors that keep their slot.
    insert_slots: [M] slot of each inserted entry, in timeline order over all edits. Write them after the moves.
    offsets: [2, 5], where the plan's part of a call begins and ends, see `splice_checks.plan_offsets`.
    arrays: the same plan in numpy's arrays.
    """

    length: int
    new_length: int
    capacity: int
    discipline: str
    edits: Tensor
    segments: Tensor
    stays: Tensor
    insert_slots: Tensor
    offsets: Tensor
    arrays: splicing.SplicePlan = field(repr=False)
    _slots: Tensor | None = field(default=None, repr=False)
    _new_slots: Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_edits(
        cls,
        length: int,
        edits: Sequence[Edit],
        *,
        capacity: int,
        discipline: str = "ordered",
        slots: Tensor | Sequence[int] | Ints | None = None,
    ) -> SplicePlan:
        """Validate `edits` (sorted by start, disjoint, in range, the result within `capacity`) and plan the moves.

        slots: rank-to-slot map before the splice, [length], a permutation of 0..length-1; slots discipline only,
            default identity.

        Raises TypeError for what is not an integer, ValueError (naming the edit) for everything else.
        """
        if isinstance(slots, Tensor):
            check_tensor("slots", slots, INDEX_DTYPES)
            slots = slots.detach().cpu().numpy()
        plan = splicing.SplicePlan.from_edits(length, edits, capacity=capacity, discipline=discipline, slots=slots)
        tensor = torch.from_numpy
        mapped = discipline == "slots"
        return cls(
            plan.length,
            plan.new_length,
            plan.capacity,
            plan.discipline,
            tensor(plan.edits),
            tensor(plan.segments),
            tensor(plan.stays),
            tensor(plan.insert_slots),
            tensor(np.array(plan_offsets((plan,)), dtype=np.int64)),
            plan,
            tensor(plan.slots) if mapped else None,
            tensor(plan.new_slots) if mapped else None,
        )

    @property
    def n_insert(self) -> int:
        return self.insert_slots.shape[0]

    @cached_property
    def slots(self) -> Tensor:
        """[length] slot of each entry by rank, before."""
        return torch.arange(self.length, device="cpu") if self._slots is None else self._slots

    @cached_property
    def new_slots(self) -> Tensor:
        """[new_length] slot of each entry by rank, after."""
        return torch.arange(self.new_length, device="cpu") if self._new_slots is None else self._new_slots

    @cached_property
    def moves(self) -> Tensor:
        """[n, 2] (source slot, destination slot) of every survivor that moves, in the order of `segments`."""
        return torch.from_numpy(self.arrays.moves)

    @cached_property
    def removed_slots(self) -> Tensor:
        """Slot of each removed entry, in timeline order over all edits."""
        return torch.from_numpy(self.arrays.removed_slots)

    @cached_property
    def insert_ranks(self) -> Tensor:
        """[M] rank after the splice of each inserted entry."""
        return torch.from_numpy(self.arrays.insert_ranks)

    @cached_property
    def rank_map(self) -> Tensor:
        """[length] rank after the splice of each entry by its rank before; -1 where it is removed."""
        return torch.from_numpy(self.arrays.rank_map)


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the slots of each sequence lie in a paged cache: slot s of sequence b is row s % page_size of page
    table[b, s // page_size]. Capacity of a sequence: max_pages * page_size.

    table: [B, max_pages] int32 or int64, on the cache's device; entries beyond a sequence's pages are never read.
    """

    table: Tensor
    page_size: int

    def __post_init__(self) -> None:
        check_tensor("table", self.table, INDEX_DTYPES)
        if self.table.dim() != 2:
            raise ValueError(f"table: expected shape [B, max_pages], got {describe(self.table)}")
        if isinstance(self.page_size, bool) or not isinstance(self.page_size, int):
            raise TypeError(f"page_size: expected an int, got {describe(self.page_size)}")
        if self.page_size < 1:
            raise ValueError(f"page_size: expected at least 1, got {self.page_size!r}")

    @property
    def capacity(self) -> int:
        return self.table.shape[1] * self.page_size

    @property
    def sequences(self) -> int:
        return self.table.shape[0]
