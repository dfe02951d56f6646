"""One question about a long history, answered within a budget of slots: the interface that every way keeps to.

A reader is opened on a history, which may take minutes, and then answers many questions. Unless it is opened with
`remember=True` no question leaves a trace: each is answered as if it were the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a text: number 0 is the history, number n the n-th text of `Opened.tell`."""

    start: int
    stop: int
    text: int = 0


@dataclass(frozen=True)
class History:
    """A long text, the system prompt excluded.

    ids: [n] int64. read: spans that have to be read through the model, sorted and disjoint; what lies between may be
    given copied gists (see `fill`), of what is beyond reading. None: all of it is read.
    """

    ids: Tokens
    read: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class Question:
    """answers: texts that a right answer contains, all of them. candidates: continuations of the same form that are
    ranked by log-probability; the first is the right one, the one at `stale`, if any, was right once. evidence: where
    the answer stands. opening: how the answer begins, given to the model after the prompt.
    """

    prompt: str
    answers: tuple[str, ...]
    candidates: tuple[str, ...]
    evidence: tuple[Span, ...]
    opening: str = ""
    max_new_tokens: int = 24
    stale: int | None = None


@dataclass(frozen=True)
class Reply:
    """text: up to the first line break. logprobs: nats of each candidate, summed over its tokens. slots: most cache
    slots in use at a time, candidates excluded. swaps: nodes expanded or collapsed. seconds: wall clock of answering.
    seen: share of the evidence's tokens that stood in the context as tokens when the answer began. refocus: tokens
    from the start of the question until all of them did; None: they did not, up to the end of the answer."""

    text: str
    logprobs: tuple[float, ...]
    slots: int
    swaps: int
    seconds: float
    seen: float
    refocus: int | None


class Opened(Protocol):
    """A history that is ready to be asked."""

    def ask(self, question: Question) -> Reply: ...

    def tell(self, ids: Tokens) -> int:
        """A further text comes in; returns its number for `Span.text`. Raises InputError unless opened with
        `remember=True`."""
        ...

    def close(self) -> None: ...


class Reader(Protocol):
    """name: as the tables show it. most: longest history, in tokens, that it can be opened on; None: any."""

    @property
    def name(self) -> str: ...

    @property
    def most(self) -> int | None: ...

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        """remember: questions and answers become part of what later ones see. progress: called with tokens read.

        Raises InputError if the history is too long for this reader, or it cannot remember.
        """
        ...


def share_covered(evidence: Sequence[tuple[int, int]], shown: Sequence[tuple[int, int]]) -> float:
    """Share of the tokens of `evidence` that lie in a span of `shown` (disjoint); NaN without evidence."""
    total = sum(stop - start for start, stop in evidence)
    inside = sum(max(0, min(b, d) - max(a, c)) for a, b in evidence for c, d in shown)
    return inside / total if total else float("nan")
