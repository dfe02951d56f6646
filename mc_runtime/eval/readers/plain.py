"""Plain attention over tokens in a cache of fixed size: what every reader without gists answers with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mc_runtime.errors import BudgetError, InputError
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import LoadedModel

from .base import History, Question, Reply, Span, Tokens, share_covered
from .decoding import decode, prompt_ids, rank

# Tokens per forward.
PART = 1024
# A longest common prefix with what was read before is kept; questions of a few tokens more or less shall not change
# where the text before them begins.
ROOM_STEP = 32


class PlainContext:
    """Tokens at positions 0, 1, ... of a cache of `capacity` slots. `ids`: those in it."""

    def __init__(self, model: LoadedModel, capacity: int) -> None:
        self.model, self.ids = model, list[int]()
        decoder = model.decoder
        self.cache = KVCache.allocate(model.config, capacity, dtype=decoder.dtype, device=decoder.device)
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def read(self, ids: Sequence[int]) -> Tensor:
        """Let the context be `ids`, running only what differs from what it is; returns the next token's logits.

        Raises BudgetError if they do not fit.
        """
        same = 0
        for a, b in zip(self.ids, ids, strict=False):
            if a != b:
                break
            same += 1
        same = min(same, len(ids) - 1)  # the last token is run in any case, for its logits
        self.ids = self.ids[:same]
        self.cache.pos[0, same:] = -1
        for i in range(same, len(ids), PART):
            logits = self.append(ids[i : i + PART])
        return logits

    @torch.inference_mode()
    def append(self, ids: Sequence[int]) -> Tensor:
        """Run further tokens; returns the next token's logits [vocab]. Raises BudgetError if they do not fit."""
        start, stop = len(self.ids), len(self.ids) + len(ids)
        if stop > self.cache.capacity:
            raise BudgetError(f"budget: {stop} tokens do not fit {self.cache.capacity} slots")
        decoder = self.model.decoder
        slots = torch.arange(start, stop, device=decoder.device)
        self.cache.pos[0, slots] = slots
        x = decoder.embed(torch.tensor([list(ids)], device=decoder.device))
        output = decoder(x, slots[None], self.cache.writer(slots[None], stop), logits=True)
        self.ids.extend(int(i) for i in ids)
        assert output.logits is not None
        return output.logits[0]

    def rank(self, logits: Tensor, candidates: Sequence[Sequence[int]]) -> list[float]:
        """See `decoding.rank`."""
        used = len(self.ids)
        return rank(self.model.decoder, self.cache.k[:, 0, :, :used], self.cache.v[:, 0, :, :used], logits, candidates)


# Given the text so far, what is asked and the slots that are free for text: the spans of text to show, in order.
Choose = Callable[["Told", Question, int], list[tuple[int, int]]]


class Told:
    """All text that a reader was told: the history, and what came after it when it remembers.

    ids: tokens, the system prompt excluded. starts: where text number n begins. turns: spans of the conversation.
    """

    def __init__(self, ids: Tokens) -> None:
        self.ids, self.starts = [int(i) for i in ids], [0]
        self.turns: list[tuple[int, int]] = []

    def tell(self, ids: Sequence[int] | Tokens) -> int:
        self.starts.append(len(self.ids))
        self.ids.extend(int(i) for i in ids)
        return len(self.starts) - 1

    def say(self, ids: Sequence[int]) -> None:
        self.turns.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids.extend(ids)

    def spans(self, evidence: Sequence[Span]) -> list[tuple[int, int]]:
        return [(self.starts[s.text] + s.start, self.starts[s.text] + s.stop) for s in evidence]


class OpenedPlain:
    """Shows the spans of text that `choose` picks behind the system prompt, then the question."""

    def __init__(
        self, model: LoadedModel, system: Sequence[int], history: History, budget: int, choose: Choose, remember: bool
    ) -> None:
        self.model, self.system, self.budget, self.choose = model, list(system), budget, choose
        self.remember = remember
        self.told = Told(history.ids)
        self.context = PlainContext(model, budget)
        self._gap = model.tokenizer.encode("\n\n")

    def room(self, question: Question) -> int:
        """Slots left to text beside the system prompt, the question and the answer."""
        taken = len(self.system) + len(prompt_ids(self.model, question)) + question.max_new_tokens
        return (self.budget - taken) // ROOM_STEP * ROOM_STEP

    def shown(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of spans; an empty line stands where text was left out between two."""
        ids: list[int] = []
        before: int | None = None
        for start, stop in spans:
            if before is not None and start != before:
                ids += self._gap
            ids += self.told.ids[start:stop]
            before = stop
        return ids

    @torch.inference_mode()
    def ask(self, question: Question) -> Reply:
        start = time.perf_counter()
        spans = self.choose(self.told, question, self.room(question))
        turn = prompt_ids(self.model, question)
        logits = self.context.read([*self.system, *self.shown(spans), *turn])
        encoded = [self.model.tokenizer.encode(c) for c in question.candidates]
        logprobs = self.context.rank(logits, encoded)
        answer: list[int] = []

        def step(token: int) -> Tensor:
            answer.append(token)
            return self.step(question, turn, answer)

        text, read, rest = decode(self.model, logits, step, question.max_new_tokens)
        seen = share_covered(self.told.spans(question.evidence), spans)
        if self.remember:
            self.told.say([*turn, *read, *rest, *self.model.chat.assistant_end_ids()])
        refocus = len(turn) if seen == 1 else None
        return Reply(text, tuple(logprobs), len(self.context.ids), 0, time.perf_counter() - start, seen, refocus)

    def step(self, question: Question, turn: Sequence[int], answer: Sequence[int]) -> Tensor:
        """Read the last token of the answer so far; returns the logits [vocab] of the next."""
        return self.context.append(answer[-1:])

    def tell(self, ids: Tokens) -> int:
        if not self.remember:
            raise InputError("tell: expected a reader that remembers, got one opened for single questions")
        return self.told.tell(ids)

    def close(self) -> None:
        pass
