"""What a session measures of itself. All times are wall clock, in seconds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


@dataclass
class TurnStats:
    """One user turn.

    time_to_first_token: from the call to the first sampled token: prompt, refocus and recomputation included.
    decode: time of each decode step without the refocus. refocus: each refocus of the turn.
    finish_reason: `stop` (the model's end token, or a stop string), `length` (max_new_tokens), or `cut` (the stream was
    closed before its end, or failed).
    """

    prompt: str = ""
    prompt_tokens: int = 0
    new_tokens: int = 0
    expanded: int = 0
    collapsed: int = 0
    recomputed: int = 0
    time_to_first_token: float = 0.0
    finish_reason: str = "cut"
    refocus: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)

    @property
    def edits(self) -> int:
        return self.expanded + self.collapsed

    @property
    def seconds_per_token(self) -> float:
        """Median decode step; NaN without any."""
        return statistics.median(self.decode) if self.decode else float("nan")

    @property
    def seconds_per_refocus(self) -> float:
        """Median; NaN without any."""
        return statistics.median(self.refocus) if self.refocus else float("nan")


@dataclass(frozen=True)
class SessionStats:
    """tokens: in the history. slots: level -> cache slots in use. nodes: level -> nodes stored in the tree."""

    tokens: int
    budget: int
    slots: dict[int, int]
    nodes: dict[int, int]
    documents: int
    turns: list[TurnStats]

    @property
    def used(self) -> int:
        return sum(self.slots.values())
