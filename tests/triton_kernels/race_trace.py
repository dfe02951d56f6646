"""What a kernel reads and writes under Triton's interpreter, and whether another order could change the result.

The interpreter runs programs one after the other and each operation for all threads at once; a GPU does neither. So the
trace is held against what a GPU guarantees: nothing between programs, and between the threads of one only barriers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

Addresses = npt.NDArray[np.int64]


class RaceTrace:
    """Records accesses to the memory of `caches` (one dtype, elements at multiples of its size)."""

    def __init__(self, patch: pytest.MonkeyPatch, caches: list[Tensor], *, backwards: bool = False) -> None:
        """backwards: run the programs from the last to the first."""
        self.ranges = [
            (s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (x.untyped_storage() for x in caches) if s.nbytes()
        ]
        self.programs: list[list[tuple[str, Addresses]]] = []
        load, store, begin = (
            getattr(InterpreterBuilder, name) for name in ("create_masked_load", "create_masked_store", "set_grid_idx")
        )

        def traced_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._record("load", pointers, mask)
            return load(builder, pointers, mask, *rest)

        def traced_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._record("store", pointers, mask)
            return store(builder, pointers, value, mask, *rest)

        def traced_begin(builder: Any, x: int, y: int, z: int) -> None:
            self.programs.append([])
            begin(builder, builder.grid_dim[0] - 1 - x if backwards else x, y, z)

        def traced_barrier(_: Any) -> None:
            self.programs[-1].append(("barrier", np.zeros(0, np.int64)))

        patch.setattr(InterpreterBuilder, "create_masked_load", traced_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", traced_store)
        patch.setattr(InterpreterBuilder, "set_grid_idx", traced_begin)
        patch.setattr(InterpreterBuilder, "create_barrier", traced_barrier)

    def _record(self, what: str, pointers: Any, mask: Any) -> None:
        at = np.asarray(pointers.data).astype(np.int64).ravel()
        at = at[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data)).ravel()]
        inside = np.zeros(at.shape, bool)
        for low, high in self.ranges:
            inside |= (at >= low) & (at < high)
        if inside.any():
            self.programs[-1].append((what, at[inside]))

    def check(self) -> None:
        """No two programs meet; within one, nothing is written twice, read after it was written, or written by one
        thread while another may still have to read it."""
        stored = [np.zeros(0, np.int64)]
        loaded = [np.zeros(0, np.int64)]
        for events in self.programs:
            written, unfenced, read = [np.zeros((0,), np.int64) for _ in range(3)]
            for what, at in events:
                if what == "barrier":
                    unfenced = unfenced[:0]
                elif what == "load":
                    assert not np.intersect1d(at, written).size, "a program reads what it has overwritten"
                    unfenced, read = np.union1d(unfenced, at), np.union1d(read, at)
                else:
                    assert not np.intersect1d(at, unfenced).size, "a store without a barrier after a load of its target"
                    assert np.unique(at).size == at.size, "a store writes a place twice"
                    assert not np.intersect1d(at, written).size, "a program writes a place twice"
                    written = np.union1d(written, at)
            stored.append(written)
            loaded.append(np.setdiff1d(read, written))
        everything = np.concatenate(stored)
        assert np.unique(everything).size == everything.size, "two programs write a place"
        assert not np.intersect1d(np.concatenate(loaded), everything).size, "a program reads what another writes"
