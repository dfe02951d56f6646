"""Readers that do not search: no text (floor), the newest tokens (StreamingLLM), all or the evidence (ceilings)."""

from __future__ import annotations

from collections.abc import Sequence

from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel

from .base import History, Opened, Progress, Question
from .bm25 import GAP, merged
from .plain import OpenedPlain, Told

# Tokens shown on either side of evidence.
MARGIN = 64


class NoText:
    """The system prompt and the question alone: what the model guesses."""

    name, most = "no text", None

    def __init__(self, model: LoadedModel, system: Sequence[int], budget: int) -> None:
        self.model, self.system, self.budget = model, system, budget

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        return OpenedPlain(self.model, self.system, history, self.budget, lambda told, question, room: [], remember)


class Recency:
    """StreamingLLM (Xiao et al. 2023): the system prompt as sink, and the newest tokens that fit."""

    name, most = "recency (StreamingLLM)", None

    def __init__(self, model: LoadedModel, system: Sequence[int], budget: int) -> None:
        self.model, self.system, self.budget = model, system, budget

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        return OpenedPlain(self.model, self.system, history, self.budget, newest, remember)


class EvidenceAlone:
    """What the answer stands in, and `MARGIN` tokens on either side: the ceiling of reading, at any length."""

    name, most = "evidence alone", None

    def __init__(self, model: LoadedModel, system: Sequence[int], budget: int) -> None:
        self.model, self.system, self.budget = model, system, budget

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        return OpenedPlain(self.model, self.system, history, self.budget, around, remember)


def around(told: Told, question: Question, room: int) -> list[tuple[int, int]]:
    """The newest tokens that fit of the evidence and what surrounds it."""
    found: list[tuple[int, int]] = []
    for start, stop in reversed(merged([(max(0, a - MARGIN), b + MARGIN) for a, b in told.spans(question.evidence)])):
        last = min(stop, len(told.ids))
        first = max(start, last - room)
        if first < last:
            found.insert(0, (first, last))
            room -= last - first + GAP
    return found


def newest(told: Told, question: Question, room: int) -> list[tuple[int, int]]:
    stop = len(told.ids)
    start = max(0, stop - max(room, 0))
    return [(start, stop)] if start < stop else []


class FullContext:
    """All text in the window, however many slots that takes; for histories that fit what the model was trained for."""

    name = "full context"

    def __init__(self, model: LoadedModel, system: Sequence[int], most: int, spare: int = 512) -> None:
        """most: slots. spare: of these, kept for questions and answers."""
        self.model, self.system, self.slots = model, system, min(most, model.config.max_positions)
        self.most: int | None = self.slots - spare - len(system)

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        if self.most is not None and len(history.ids) > self.most:
            raise InputError(f"history: expected at most {self.most} tokens, got {len(history.ids)}")
        return OpenedPlain(self.model, self.system, history, self.slots, newest, remember)
