"""Ours: a Working Context over the history's tree, with any focus policy."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from mc_runtime import Session
from mc_runtime.answers import TurnDocuments
from mc_runtime.context import WorkingContext
from mc_runtime.errors import InputError
from mc_runtime.focus import FocusPolicy
from mc_runtime.turns import Turn

from .base import History, Opened, Progress, Question, Reply, Tokens, share_covered
from .decoding import decode, prompt_ids, rank
from .store import MemoryStore

# Makes the policy for one question, given where in the tree its evidence stands; only an oracle looks at that.
MakePolicy = Callable[[Sequence[tuple[int, int]]], FocusPolicy]


class MemoryReader:
    """Sessions of one store, with the policies that `make_policy` gives."""

    most = None

    def __init__(self, name: str, store: MemoryStore, make_policy: MakePolicy) -> None:
        self.name, self.store, self.make_policy = name, store, make_policy

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        stack = ExitStack()
        if remember:
            session = stack.enter_context(self.store.copy(history, progress))
        else:
            session = self.store.shared(history, progress)
        return OpenedMemory(session, self.make_policy, remember, stack)


class OpenedMemory:
    """remember: turns go into the session's own context and tree; else each is read on a branch."""

    def __init__(self, session: Session, make_policy: MakePolicy, remember: bool, stack: ExitStack) -> None:
        self.session, self.make_policy, self.remember = session, make_policy, remember
        self.starts = [session.focus.head]
        self._stack = stack
        self._documents = TurnDocuments(session.tree)
        with torch.inference_mode():
            session.focus.make_room(session.context, 0)  # brings in what was ingested, once for all branches

    def spans(self, question: Question) -> list[tuple[int, int]]:
        """Where the question's evidence stands in the tree."""
        return [(self.starts[s.text] + s.start, self.starts[s.text] + s.stop) for s in question.evidence]

    def turn(self, question: Question) -> Turn:
        session, policy = self.session, self.make_policy(self.spans(question))
        if self.remember:
            session.focus.policy = policy
            self._documents.kind = "user"
            self._documents.number = 1 + session.tree.count_documents("user")
            return Turn(session.model, session.context, session.focus, self._commit)
        branch = session.context.fork(session.context.cache.stacked(1))
        focus = session.focus.branch()
        focus.policy = policy
        return Turn(session.model, branch, focus, None)

    def _commit(self, context: WorkingContext) -> None:
        context.commit(self.session.builder, self._documents.record)

    @torch.inference_mode()
    def ask(self, question: Question) -> Reply:
        start = time.perf_counter()
        model, turn, evidence = self.session.model, self.turn(question), self.spans(question)
        prompt = prompt_ids(model, question)
        if self.remember:  # how the answer begins is the answer's, also for those who look back at this turn
            opening = model.tokenizer.encode(question.opening)
            logits = turn.read(prompt[: len(prompt) - len(opening)], question.prompt)
            self._documents.kind = "assistant"
            for token in opening:
                logits = turn.step(token)
        else:
            logits = turn.read(prompt, question.prompt)
        context, begun = turn.context, len(turn.generated)
        seen, slots = share_covered(evidence, context.entries.token_spans()), context.used
        refocus = len(prompt) if seen == 1 else None
        k, v = context.cache.gather(context.slots)
        logprobs = rank(model.decoder, k, v, logits, [model.tokenizer.encode(c) for c in question.candidates])

        def step(token: int) -> Tensor:
            nonlocal slots, refocus
            after = turn.step(token)
            slots = max(slots, context.used)
            if refocus is None and share_covered(evidence, context.entries.token_spans()) == 1:
                refocus = len(prompt) + len(turn.generated) - begun
            return after

        text, _, rest = decode(model, logits, step, question.max_new_tokens)
        if self.remember:
            turn.finish([*rest, *model.chat.assistant_end_ids()])
        swaps = turn.stats.expanded + turn.stats.collapsed
        return Reply(text, tuple(logprobs), slots, swaps, time.perf_counter() - start, seen, refocus)

    def tell(self, ids: Tokens) -> int:
        if not self.remember:
            raise InputError("tell: expected a reader that remembers, got one opened for single questions")
        self.starts.append(self.session.ingest(ids).start)
        return len(self.starts) - 1

    def close(self) -> None:
        self._stack.close()
