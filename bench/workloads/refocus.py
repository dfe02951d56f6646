"""`refocus_`: from scores to an edited cache, all layers in one call.

Every call decides from the same state, which is put back before it: copies of some arrays of one number an entry, timed
with the rest. What a call reads and writes is the same however often it has run before. Checked on up to CHECKED_ROWS
layers from the first to the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from mc_kernels import refocus_
from mc_kernels.gist_pool.weights import GistPoolWeights
from mc_kernels.refocus.state import GistStore, RefocusState

from .base import Check, Workload, error_rule
from .kv_splice import CHECKED_ROWS

Args = dict[str, Any]
ARRAYS = tuple(field.name for field in fields(RefocusState))


class Refocus(Workload):
    op = "refocus_"

    def __init__(self, case: Any, dtype: torch.dtype, device: torch.device, copies: int = 1) -> None:
        super().__init__(case, dtype, device, copies)
        self.inputs = [x | {"before": x["state"].clone()} for x in self.inputs]

    @property
    def rivals(self) -> tuple[str, ...]:
        """No library does this; the oracle, which waits for the device to decide, is plain PyTorch's way."""
        return ("torch",)

    @staticmethod
    def touched(case: Any, dtype: torch.dtype) -> int:
        return int(case.cache_bytes(dtype) + case.bytes(dtype))

    def ours(self, inputs: Args, backend: str) -> None:
        for name in ARRAYS:
            getattr(inputs["state"], name).copy_(getattr(inputs["before"], name))
        refocus_(**{name: x for name, x in inputs.items() if name != "before"}, backend=backend)

    def result(self, inputs: Args, out: None) -> tuple[Tensor, ...]:
        """k and v [L, Hkv, new_length, D] in timeline order, and the entries' levels and nodes."""
        state, n = inputs["state"], self.case.plan.new_length
        slots = state.slots[:n]
        return (
            *(inputs[x].index_select(2, slots) for x in ("k", "v")),
            *(x[:n].to(inputs["k"].dtype) for x in (state.levels, state.index)),
        )

    def plain(self, inputs: Args) -> None:
        self.ours(inputs, "ref")

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        spread = torch.linspace(0, self.case.layers - 1, min(CHECKED_ROWS, self.case.layers))
        layers = spread.round().long().to(self.device)

        def sample(dtype: torch.dtype) -> Args:
            store = inputs["store"]
            return inputs | {
                **{x: inputs[x][layers].to(dtype) for x in ("k", "v")},
                "state": inputs["before"].clone(),
                "store": GistStore(store.k[layers].to(dtype), store.v[layers].to(dtype), store.keys, store.rows),
                "weights": [GistPoolWeights(*(x[layers].to(dtype) for x in w.tensors())) for w in inputs["weights"]],
            }

        exact, plain = sample(torch.float64), sample(self.dtype)
        self.plain(exact)
        self.plain(plain)
        judged = self.result(exact, None), self.result(plain, None)
        return lambda out: error_rule([*(x[layers] for x in out[:2]), *out[2:]], *judged)
