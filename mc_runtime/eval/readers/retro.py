"""RETRO's schedule (Borgeaud et al. 2022): every 64 tokens the passages are chosen anew by the latest 64 tokens.

RETRO reads its neighbours through cross-attention that is trained for it; a frozen model can only have them put before
the text. A neighbour is a piece of 64 tokens and the 64 that follow it. Within the first 64 tokens of an answer it
differs from BM25 append in what it searches with, and in its pieces.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel

from .base import History, Opened, Progress, Question
from .bm25 import IndexedText
from .decoding import prompt_ids
from .plain import OpenedPlain, Told

PIECE = 64


class Retro:
    name, most = "re-retrieval (RETRO)", None

    def __init__(self, model: LoadedModel, system: Sequence[int], budget: int) -> None:
        self.model, self.system, self.budget = model, system, budget

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        if remember:
            raise InputError(f"remember: {self.name} answers single questions only")
        return OpenedRetro(self.model, self.system, history, self.budget)


class OpenedRetro(OpenedPlain):
    """See the module."""

    def __init__(self, model: LoadedModel, system: Sequence[int], history: History, budget: int) -> None:
        super().__init__(model, system, history, budget, self._first, remember=False)
        self._text = IndexedText(model.tokenizer, PIECE)
        self._text.update(self.told)

    def _first(self, told: Told, question: Question, room: int) -> list[tuple[int, int]]:
        return self._neighbours(prompt_ids(self.model, question), room)

    def _neighbours(self, latest: Sequence[int], room: int) -> list[tuple[int, int]]:
        return self._text.index.best(self.model.tokenizer.decode(latest[-PIECE:]), room, follow=PIECE)

    def step(self, question: Question, turn: Sequence[int], answer: Sequence[int]) -> Tensor:
        if len(answer) % PIECE:
            return self.context.append(answer[-1:])
        spans = self._neighbours([*turn, *answer], self.room(question))
        return self.context.read([*self.system, *self.shown(spans), *turn, *answer])
