"""Engines behind a prompt-embedding interface: whole contexts in, tokens out, and nobody reaches the cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mc_runtime.errors import BudgetError
from mc_runtime.sampling import SamplingParams

from .base import Engine, Reading


class PromptEngine(Engine):
    """What is left to implement is how contexts are sent: `_complete`, which gets checked arguments, and
    `next_logits`."""

    def complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, *, count: int, eos_ids: Collection[int] = ()
    ) -> list[list[int]]:
        for rows in contexts:
            self.check_rows(rows, count)
        return self._complete([self.to_send(rows) for rows in contexts], params, count, eos_ids) if contexts else []

    @abstractmethod
    def _complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, count: int, eos_ids: Collection[int]
    ) -> list[list[int]]: ...

    @abstractmethod
    def next_logits(self, rows: Tensor) -> Tensor:
        """rows [N, E] -> [vocab] fp32, up to a constant: of the token that follows. Such engines give
        log-probabilities token by token, which for a whole vocabulary is slow: for measurements. `complete` decodes."""

    def prefill(self, rows: Tensor, *, room: int = 256) -> PromptReading:
        self.check_rows(rows, room)
        return PromptReading(self, rows, room)

    @staticmethod
    def to_send(rows: Tensor) -> Tensor:
        """Rows of their own on the CPU: no view of a larger storage, which would be sent along."""
        return rows.detach().to("cpu", copy=True).contiguous()


class PromptReading(Reading):
    """A context that is sent anew, one vector longer, for each token."""

    def __init__(self, engine: PromptEngine, rows: Tensor, room: int) -> None:
        self.engine, self.rows, self.capacity = engine, rows, len(rows) + room
        self.logits = engine.next_logits(engine.to_send(rows))

    def decode(self, token: int) -> Tensor:
        """Raises BudgetError when the room is used up."""
        if len(self.rows) == self.capacity:
            raise BudgetError(f"room: the {self.capacity} entries of this reading are used up; prefill with more")
        row = self.engine.embed(torch.tensor([[token]], device=self.engine.device))[0]
        self.rows = torch.cat((self.rows, row.to(self.rows)))
        self.logits = self.engine.next_logits(self.engine.to_send(self.rows))
        return self.logits
