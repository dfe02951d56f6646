"""A memory that answers, one token at a time, and what each step took."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.e2e.fill import fill
from bench.e2e.history import QUESTIONS
from bench.e2e.process import disk_usage, resident_memory
from bench.e2e.report import Spread
from mc_runtime import Session
from mc_runtime.model import LoadedModel
from mc_runtime.nodes import Nodes
from mc_runtime.profiling import collect_ranges

# Parts of a refocus, in the order in which they happen; `index` brings the search index up to date.
PARTS = ("index", "score", "allocate", "splice", "recompute")


def memory_settings(budget: int) -> dict[str, Any]:
    """The defaults, with fewer recent tokens where a small budget needs it."""
    return {"budget": budget, "recent_tokens": min(256, budget // 8)}


class MemoryRun:
    """A memory of `len(ids)` tokens, filled with the gists of `sample`, closed and opened again before it is asked."""

    def __init__(
        self,
        directory: Path,
        model: LoadedModel,
        ids: NDArray[np.int64],
        sample: Nodes,
        *,
        budget: int,
        answer_tokens: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        self.tokens, self.directory, self.answer_tokens = len(ids), directory, answer_tokens
        settings = memory_settings(budget)
        with Session.open(directory, model, **settings) as session:
            fill(session, ids, sample, progress)
        del session  # its cache must be gone before memory is measured
        before = resident_memory()
        start = time.perf_counter()
        self.session = Session.open(directory, model, **settings)
        self.open_seconds = time.perf_counter() - start
        self._before, self._growth = before, dict.fromkeys(before, 0)
        self._answer: Iterator[str] | None = None
        self._asked = 0
        self._wall = 0.0  # of steps that do not start a turn
        self._wall_tokens = 0
        # For refocuses that open a turn and for those while decoding: seconds of each part, entries recomputed.
        self._parts: dict[str, dict[str, list[float]]] = {"turn": {}, "decode": {}}
        self._recomputed: dict[str, list[float]] = {"turn": [], "decode": []}

    def ready(self) -> None:
        """Ask the first question, which assembles the context, up to its first token."""
        self.step()
        after = resident_memory()
        self._growth = {name: after[name] - self._before[name] for name in after}

    @property
    def decoded(self) -> int:
        return sum(len(turn.decode) for turn in self.session.stats().turns)

    def step(self) -> None:
        """Decode until a piece of text comes, usually one token; ask the next question when an answer is over."""
        turns = self.session.stats().turns
        opens = self._answer is None
        if self._answer is None:
            question = QUESTIONS[self._asked % len(QUESTIONS)]
            # An answer of the likeliest tokens would end early: a seed and a temperature keep it going.
            self._answer = self.session.generate(
                question, stream=True, max_new_tokens=self.answer_tokens, temperature=1.0, seed=self._asked
            )
            self._asked += 1
        before, recomputed = self.decoded, 0 if opens else turns[-1].recomputed
        start = time.perf_counter()
        with collect_ranges() as ranges:
            piece = next(self._answer, None)
        if opens:
            turns = self.session.stats().turns
        else:
            self._wall += time.perf_counter() - start
            self._wall_tokens += self.decoded - before
        if piece is None:
            self._answer = None
        if "refocus" in ranges and (opens or len(turns[-1].refocus) > 1):
            kind = "turn" if opens else "decode"
            self._recomputed[kind].append(turns[-1].recomputed - recomputed)
            kept = self._parts[kind]
            kept.setdefault("refocus", []).append(sum(ranges["refocus"]))
            for name in PARTS:
                kept.setdefault(name, []).append(sum(ranges.get(f"refocus/{name}", ())))

    def row(self) -> dict[str, Any]:
        """What was measured, for the report."""
        stats = self.session.stats()
        steps = [seconds for turn in stats.turns for seconds in turn.decode]
        later = [turn.time_to_first_token for turn in stats.turns[1:] if turn.time_to_first_token]
        while_decoding = [seconds for turn in stats.turns for seconds in turn.refocus[1:]]
        per_token = Spread.of(steps, 1e3)
        return {
            "tokens": self.tokens,
            "slots": self.session.context.used,
            "ms_per_token": per_token.median,
            "spread": [per_token.low, per_token.high],
            "steps": per_token.count,
            "ms_per_token_all_in": round(self._wall / self._wall_tokens * 1e3, 3) if self._wall_tokens else None,
            "ms_per_refocus": Spread.of(while_decoding, 1e3).median,
            "refocus_spread": asdict(Spread.of(while_decoding, 1e3)),
            "refocus_parts_ms": self._medians("decode"),
            "turn_refocus_parts_ms": self._medians("turn"),
            "recomputed_entries": {kind: Spread.of(counts).median for kind, counts in self._recomputed.items()},
            "open_s": round(self.open_seconds, 4),
            "first_turn_s": round(stats.turns[0].time_to_first_token, 4),
            "first_token_s": Spread.of(later).median,
            "disk_bytes": disk_usage(self.directory),
            "memory_bytes": self._growth,
        }

    def _medians(self, kind: str) -> dict[str, float | None]:
        return {name: Spread.of(seconds, 1e3).median for name, seconds in self._parts[kind].items()}

    def end_answer(self) -> None:
        """Stop in the middle of an answer, so that the session is free for something else."""
        if isinstance(self._answer, Generator):
            self._answer.close()
        self._answer = None

    def close(self) -> None:
        """Close the session."""
        self.session.close()
