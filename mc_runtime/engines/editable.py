"""`CacheEngine`: an engine that runs over a cache of ours, whose entries can be replaced in place."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from mc_runtime.errors import BudgetError
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import DecoderOutput, KVStore

from .base import Engine, Reading


class CacheEngine(Engine):
    """Runs entries over a store of unrotated keys with explicit positions; one forward serves prefill, insertion,
    recomputation and decoding. Splices are the store's: `KVCache.splice` on what `allocate` gave."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        store: KVStore | None = None,
        *,
        stop_layer: int | None = None,
        return_mass: bool = False,
        hidden_layer: int | None = None,
        logits: bool = False,
    ) -> DecoderOutput:
        """Run entries: see `Decoder.forward`, whose contract this is."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] of a forward -> [..., vocab]."""

    def allocate(self, capacity: int, *, batch: int = 1, weighted: bool = False) -> KVCache:
        """A store of `capacity` slots in each of `batch` rows. weighted: entries may have log-weights."""
        return KVCache.allocate(
            self.config, capacity, batch=batch, dtype=self.dtype, device=self.device, weighted=weighted
        )

    def prefill(self, rows: Tensor, *, room: int = 256) -> CacheReading:
        self.check_rows(rows, room)
        return CacheReading(self, rows, room)


class CacheReading(Reading):
    """A context in a cache of its own. cache: its entries, in slots that are their ranks."""

    def __init__(self, engine: CacheEngine, rows: Tensor, room: int) -> None:
        self.engine, self.used = engine, 0
        self.cache = engine.allocate(len(rows) + room)
        self.logits = self._run(rows[None].to(engine.device))

    def decode(self, token: int) -> Tensor:
        """Raises BudgetError when the room is used up."""
        if self.used == self.cache.capacity:
            raise BudgetError(f"room: the {self.cache.capacity} slots of this reading are used up; prefill with more")
        self.logits = self._run(self.engine.embed(torch.tensor([[token]], device=self.engine.device)))
        return self.logits

    @torch.inference_mode()
    def _run(self, x: Tensor) -> Tensor:
        slots = torch.arange(self.used, self.used + x.shape[1], device=self.engine.device)
        self.used += x.shape[1]
        self.cache.pos[0, slots] = slots
        output = self.engine.forward(x, slots[None], self.cache.writer(slots[None], self.used), logits=True)
        assert output.logits is not None
        return output.logits[0]
