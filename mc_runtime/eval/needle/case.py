"""One history and what is asked of it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

from ..readers import History, Question


@dataclass(frozen=True)
class Case:
    history: History
    questions: tuple[Question, ...]

    def depth(self, question: Question) -> float:
        """Where the first piece of evidence begins, as a share of the history."""
        return min(span.start for span in question.evidence) / len(self.history.ids)


class Task(Protocol):
    """Makes histories. `per_history`: most questions that one history serves; None: as many as are asked for."""

    @property
    def name(self) -> str: ...

    @property
    def per_history(self) -> int | None: ...

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        """A history of about `size` tokens with `count` questions. Raises InputError if they do not fit."""
        ...
