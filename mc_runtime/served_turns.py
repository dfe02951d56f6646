"""One user turn over an engine that takes whole contexts: show the prompt, refocus, ask for tokens.

Tokens come K at a time, from one refocus to the next; what is asked for is the layout of that moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from .engines import Engine
from .focus.controller import FocusController
from .model import LoadedModel
from .prompt_context import PromptContext
from .sampling import SamplingParams
from .stats import TurnStats
from .turns import QUERY_TOKENS, part_size

Commit = Callable[[PromptContext], None]


class ServedTurn:
    """State of one turn. commit: called whenever tokens should become durable; None: nothing is remembered."""

    def __init__(
        self, model: LoadedModel, context: PromptContext, focus: FocusController, commit: Commit | None
    ) -> None:
        self.model, self.context, self.focus, self.commit = model, context, focus, commit
        self.stats = TurnStats()
        self.generated: list[int] = []
        self.ended = False
        self._start = context.length

    def read(self, prompt: str) -> None:
        """Show the prompt and refocus on it."""
        ids = self.model.chat.user_turn_ids(prompt)
        self.stats.prompt, self.stats.prompt_tokens = prompt, len(ids)
        self.focus.turn_start = self.context.length
        self.append(ids)
        self._refocus(prompt, new_turn=True)

    def append(self, ids: Sequence[int]) -> None:
        """Show tokens, in parts that fit."""
        size = part_size(self.context, self.focus)
        for i in range(0, len(ids), size):
            part = ids[i : i + size]
            self.focus.make_room(self.context, len(part))
            self.context.append(part)
            if self.commit is not None:
                self.commit(self.context)

    def _refocus(self, query: str, *, new_turn: bool = False) -> None:
        report = self.focus.refocus(
            self.context, query=query, reserve=self.context.config.block_size, new_turn=new_turn
        )
        self.stats.refocus.append(report.seconds)
        self.stats.expanded += report.expanded
        self.stats.collapsed += report.collapsed

    def take(self, tokens: Sequence[int], asked: int) -> None:
        """Book what the engine said when `asked` for so many tokens; K tokens are followed by a refocus."""
        size = self.context.config.block_size
        self.context.append(tokens)
        self.generated += tokens
        self.stats.new_tokens += len(tokens)
        self.ended = len(tokens) < asked
        if len(tokens) < size:
            return
        if self.commit is not None:
            self.commit(self.context)
        recent = self.model.tokenizer.decode(self.generated[-QUERY_TOKENS:])
        self._refocus(f"{self.stats.prompt}\n{recent}")

    def finish(self, ids: Sequence[int]) -> None:
        """Show the tokens that close the answer and make the turn durable; what cannot be written is dropped."""
        self.focus.turn_start = None
        if self.context.length == self._start:
            return
        try:
            if ids:
                self.append(ids)
            elif self.commit is not None:
                self.commit(self.context)
        except BaseException:
            self.context.drop_pending()
            raise


@torch.inference_mode()
def ask(engine: Engine, turns: Sequence[ServedTurn], params: SamplingParams) -> tuple[list[list[int]], int]:
    """The next up to K tokens of each turn, from one call of the engine, and how many were asked for. All turns have
    said alike many. `take` books what is kept of them."""
    said, size = len(turns[0].generated), turns[0].context.config.block_size
    count = min(size, params.max_new_tokens - said)
    # The engine's generator starts anew with each request: with one seed, all would draw the same numbers.
    part = replace(params, seed=None if params.seed is None else (params.seed + said) % 2**63)
    start = time.perf_counter()
    rows = [turn.context.rows() for turn in turns]
    tokenizer = turns[0].model.tokenizer
    said_now = engine.complete(rows, part, count=count, eos_ids=tokenizer.eos_ids)
    # A row that pads the model's vocabulary is no token; nothing can follow what cannot be remembered.
    answers = [list(takewhile(lambda token: token < tokenizer.vocab_size, tokens)) for tokens in said_now]
    seconds = (time.perf_counter() - start) / max(1, max(map(len, answers)))
    for turn, tokens in zip(turns, answers, strict=True):
        turn.stats.decode += [seconds] * len(tokens)
    return answers, count
