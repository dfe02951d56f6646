"""One user turn over a Working Context: read the prompt, refocus on it, decode.

A policy that looks at attention gets the prompt read first, and after the refocus it is recomputed on the new context
together with what was expanded, in one forward; for any other the prompt is run in that forward alone. While decoding,
a refocus follows every K tokens; it leaves K slots free, so that the budget holds at every step in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import RefreshMode
from .context import WorkingContext
from .focus.controller import FocusController, RefocusReport
from .layout import Layout
from .model import LoadedModel
from .profiling import timed
from .stats import TurnStats

# A longer prompt is read in parts, each of which may collapse what it leaves behind.
PROMPT_PART = 256
# Newest generated text that joins the prompt as the query of a refocus while decoding.
QUERY_TOKENS = 64

Commit = Callable[[WorkingContext], None]


def part_size(context: Layout, focus: FocusController) -> int:
    """Tokens read at once: of the slots that are not pinned, half are left to the rest of the history."""
    free = context.config.budget - focus.least_slots(context)
    return min(PROMPT_PART, max(context.config.block_size, free // 2))


class Turn:
    """State of one turn. `commit`, if given, is called whenever tokens should become durable."""

    def __init__(
        self, model: LoadedModel, context: WorkingContext, focus: FocusController, commit: Commit | None
    ) -> None:
        self.model, self.context, self.focus, self.commit = model, context, focus, commit
        self.stats = TurnStats()
        self.query = ""
        self.generated: list[int] = []
        self._mass: NDArray[np.float64] | None = None
        self._since_refocus = 0
        self._start = context.length

    @torch.inference_mode()
    def read(self, ids: Sequence[int], query: str) -> Tensor:
        """Read the prompt and refocus on `query`; returns the logits [vocab] of the first new token."""
        self.query = query
        self.focus.turn_start = self.context.length
        self.stats.prompt, self.stats.prompt_tokens = query, len(ids)
        want_mass = self.focus.policy.needs_mass
        parts = self._parts(ids)
        # What is announced cannot be collapsed before it has run: only what the refocus keeps in full anyway.
        announced = [] if want_mass or len(parts[-1]) > self.focus.turn_tokens else parts.pop()
        hidden, edited = self._append_in_parts(parts, want_mass=want_mass)
        self.context.announce(announced)
        mode, newest = self.focus.config.refresh, min(len(ids), self.focus.turn_tokens)
        if edited and mode == "full":  # what was edited between the parts, too
            newest = self.context.capacity
        report = self._refocus(query, newest, mode, new_turn=True)
        if announced and self.commit is not None:
            self.commit(self.context)
        last = hidden if report.last_hidden is None else report.last_hidden
        assert last is not None, "a prompt has at least one token"
        return self._logits(last)

    def _parts(self, ids: Sequence[int]) -> list[Sequence[int]]:
        size = part_size(self.context, self.focus)
        return [ids[i : i + size] for i in range(0, len(ids), size)]

    def _append_in_parts(self, parts: Sequence[Sequence[int]], *, want_mass: bool) -> tuple[Tensor | None, bool]:
        """The final hidden state [E] of the last token, and whether nodes were collapsed to make room. They are
        refreshed as while decoding: a full refresh for every part would cost many times what the parts do."""
        hidden, edited = None, False
        for i, part in enumerate(parts, start=1):
            edited |= self.focus.make_room(self.context, len(part), mode=self.focus.config.refresh_decode) > 0
            with timed("prefill"):
                # Ranks move when room is made: only the last part's mass speaks of the entries as they are then.
                output = self.context.append(part, return_mass=want_mass and i == len(parts))
            hidden = output.hidden[0, -1]
            self._mass = None
            self._add_mass(output.mass)
            if self.commit is not None:
                self.commit(self.context)
        return hidden, edited

    def _add_mass(self, mass: Tensor | None) -> None:
        if mass is None:
            return
        new = mass[:, 0].double().cpu().numpy()
        if self._mass is not None:
            new[:, : self._mass.shape[1]] += self._mass
        self._mass = new

    def _refocus(self, query: str, newest: int, mode: RefreshMode, *, new_turn: bool = False) -> RefocusReport:
        reserve = self.context.config.block_size
        report = self.focus.refocus(
            self.context, query=query, mass=self._mass, reserve=reserve, newest=newest, mode=mode, new_turn=new_turn
        )
        self._mass, self._since_refocus = None, 0
        self.stats.refocus.append(report.seconds)
        self.stats.expanded += report.expanded
        self.stats.collapsed += report.collapsed
        self.stats.recomputed += report.recomputed
        return report

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.context.engine.logits(hidden)

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Read one generated token; returns the logits [vocab] of the next."""
        start = time.perf_counter()
        with timed("decode"):
            output = self.context.append([token], return_mass=self.focus.policy.needs_mass, logits=True)
        self.stats.decode.append(time.perf_counter() - start)
        assert output.logits is not None
        return self.after_step(token, output.logits[0], output.mass)

    def after_step(self, token: int, logits: Tensor, mass: Tensor | None) -> Tensor:
        """Book-keeping of a decoded token; every K tokens a commit and a refocus, after which the logits are those of
        the new context if it was recomputed."""
        self._add_mass(mass)
        self.generated.append(token)
        self.stats.new_tokens += 1
        self._since_refocus += 1
        if self._since_refocus < self.context.config.block_size:
            return logits
        if self.commit is not None:
            self.commit(self.context)
        recent = self.model.tokenizer.decode(self.generated[-QUERY_TOKENS:])
        report = self._refocus(f"{self.query}\n{recent}", 0, self.focus.config.refresh_decode)
        return logits if report.last_hidden is None else self._logits(report.last_hidden)

    @torch.inference_mode()
    def finish(self, ids: Sequence[int]) -> None:
        """Read the tokens that close the answer and make the turn durable. Of a turn of which nothing could be read
        nothing is kept; what cannot be written is dropped from the context, so that it and the tree agree."""
        self.focus.turn_start = None
        if self.context.length == self._start:
            return
        try:
            if ids:
                self._append_in_parts(self._parts(ids), want_mass=False)
            elif self.commit is not None:
                self.focus.make_room(self.context, 0)  # what was broken off may have left the context empty
                self.commit(self.context)
        except BaseException:
            self.context.drop_pending()
            raise
