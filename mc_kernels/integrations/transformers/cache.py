"""`WorkingContextCache`: entries in slots, one allocation for all layers, spliced in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...checks import INDEX_DTYPES, check_same_device, check_shape, check_tensor
from ...kv_splice import Edit, SplicePlan, kv_splice_
from .attach import attachment_of
from .slots import SlotCache


class WorkingContextCache(SlotCache):
    """A cache for attached models whose entries can be replaced: see `SlotCache` for its memory.

    `generate` and forwards append, so they are given new tokens alone, whatever text stands behind the entries. The
    last token that `generate` returns has not been run: it comes first in the next call. Rows may differ in length.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, *, batch_size: int = 1) -> None:
        """For an attached model: its layers, heads, dtype and device. capacity: slots per row.

        Zeroed, so that a masked slot never brings a NaN into a product. Raises ValueError.
        """
        for name, value in (("capacity", capacity), ("batch_size", batch_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        probed = attachment_of(model).layers
        (heads, dim), device = probed[0].kv_shape, probed[0].device
        shape = (len(probed), 2, batch_size, heads, capacity, dim)
        data = torch.zeros(shape, dtype=probed[0].dtype, device=device)
        super().__init__(data, torch.full((batch_size, capacity), -1, dtype=torch.int64, device=device))

    def slots(self, row: int = 0) -> Tensor:
        """[N] int64 on the CPU: the slot of each entry, in timeline order."""
        return self._slots[row].clone()

    def read(self, start: int, stop: int, *, row: int = 0) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values at ranks [start, stop) of a row: [L, Hkv, n, D] each, keys unrotated."""
        if not 0 <= row < self.batch_size:
            raise ValueError(f"row: expected 0 to {self.batch_size - 1}, got {row!r}")
        if not 0 <= start <= stop <= len(self._slots[row]):
            raise ValueError(
                f"start, stop: expected 0 <= start <= stop <= {len(self._slots[row])}, got {start}, {stop}"
            )
        slots = self._slots[row][start:stop].to(self.data.device)
        return self.k[:, row].index_select(2, slots), self.v[:, row].index_select(2, slots)

    # -- edits ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def splice(
        self,
        edits: Sequence[Edit] | Mapping[int, Sequence[Edit]],
        k_new: Tensor | None = None,
        v_new: Tensor | None = None,
    ) -> None:
        """Replace entries in place, one kernel call for all layers and rows; later entries are renumbered.

        edits: for every row, or row -> edits (rows that are not named stay). k_new, v_new: [L, Hkv, M, D], the same
        for every row, or [L, B, Hkv, M, D] with M at least the most that a row inserts: keys unrotated, in the
        cache's dtype, from anywhere (`read`, `gist_pool`, a projector); None where nothing is inserted.
        Raises TypeError and ValueError, naming the argument, before anything changes.

        Entries behind an edit keep keys and values that were computed on what stood there before: `recompute` runs
        entries again.
        """
        per_row = dict(edits) if isinstance(edits, Mapping) else dict.fromkeys(range(self.batch_size), edits)
        for row in per_row:
            if isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < self.batch_size:
                raise ValueError(f"edits: expected rows 0 to {self.batch_size - 1}, got {row!r}")
        if not per_row:
            return
        plans = {
            row: SplicePlan.from_edits(
                len(self._slots[row]), some, capacity=self.capacity, discipline="slots", slots=self._slots[row]
            )
            for row, some in per_row.items()
        }
        most = max(plan.n_insert for plan in plans.values())
        rows = [-1] * self.batch_size
        for i, row in enumerate(plans):
            rows[row] = i
        k_rows, v_rows = (self._rows(name, x, most) for name, x in (("k_new", k_new), ("v_new", v_new)))
        kv_splice_(self.k, self.v, k_rows, v_rows, list(plans.values()), rows=rows * len(self.layers))
        for row, plan in plans.items():
            self._slots[row] = plan.new_slots
            self._number(row)

    def _rows(self, name: str, given: Tensor | None, most: int) -> Tensor:
        layers, _, batch, heads, _, dim = self.data.shape
        if given is None:
            if most:
                raise ValueError(f"{name}: expected the {most} inserted entries, got None")
            return self.data.new_zeros(layers * batch, heads, 0, dim)
        check_tensor(name, given, (self.data.dtype,))
        check_same_device(("data", self.data), **{name: given})
        shape = (layers, heads, "M", dim) if given.dim() == 4 else (layers, batch, heads, "M", dim)
        check_shape(name, given, shape, {})
        if given.shape[-2] < most:
            raise ValueError(f"{name}: expected at least M={most} inserted entries, got {given.shape[-2]}")
        whole = given if given.dim() == 5 else given[:, None].expand(-1, batch, -1, -1, -1)
        return whole.reshape(layers * batch, heads, -1, dim)

    @contextmanager
    def at(self, ranks: Sequence[int]) -> Iterator[None]:
        """Within it, a forward over len(ranks) entries writes over the entries at these ranks (sorted, of every row)
        instead of appending; each sees what precedes it. Prefer `recompute` and `insert_embeddings`."""
        chosen = [int(rank) for rank in ranks]
        if chosen != sorted(set(chosen)) or (chosen and not 0 <= chosen[0] <= chosen[-1] < min(self.lengths)):
            raise ValueError(f"ranks: expected sorted distinct ranks below {min(self.lengths)}, got {chosen}")
        self._targets = chosen
        try:
            yield
        finally:
            self._targets = None

    # -- what transformers asks of caches -----------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest entries of every row: -n, as in transformers, or 0."""
        count, most = -int(tokens_to_remove), min(self.lengths)
        if not 0 <= count <= most:
            raise ValueError(f"tokens_to_remove: expected {-most} to 0, got {tokens_to_remove}")
        if count:
            self.splice({row: [Edit(n - count, count, 0)] for row, n in enumerate(self.lengths)})

    def reset(self) -> None:
        """Forget all entries."""
        self._take(self.data, self.pos.fill_(-1), [torch.zeros(0, dtype=torch.int64)] * self.batch_size)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in the order of `beam_idx` [B'], of which some may come more than once."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        check_tensor("indices", indices, INDEX_DTYPES)
        index = indices.to(self.data.device)
        slots = [self._slots[row] for row in indices.tolist()]
        self._take(self.data.index_select(2, index), self.pos.index_select(0, index), slots)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))
