"""A streamed answer: one turn, token by token, as text."""

from __future__ import annotations

import time
from collections.abc import Generator

from .context import WorkingContext
from .focus.controller import FocusController
from .focus_map import FocusFrame
from .model import LoadedModel
from .nodes import NodeBuilder
from .sampling import Sampler, SamplingParams, StopStrings
from .stats import TurnStats
from .tree import Transaction, Tree
from .turns import Turn


class Answer:
    """The answer to one prompt. `pieces()` runs the turn; `stats` and `frame` (the layout that the question led to)
    fill as it goes."""

    def __init__(
        self,
        model: LoadedModel,
        context: WorkingContext,
        focus: FocusController,
        builder: NodeBuilder,
        prompt: str,
        params: SamplingParams,
    ) -> None:
        self.model, self.context, self.prompt, self.params = model, context, prompt, params
        self.frame: FocusFrame | None = None
        self._documents = TurnDocuments(context.tree)
        self._turn = Turn(model, context, focus, lambda c: c.commit(builder, self._documents.record))

    @property
    def stats(self) -> TurnStats:
        return self._turn.stats

    def pieces(self) -> Generator[str, None, None]:
        """Text as it comes. However it ends, what was said becomes part of the history."""
        start = time.perf_counter()
        params, turn, chat = self.params, self._turn, self.model.chat
        text, end = self.model.tokenizer.stream_decoder(), chat.assistant_end_ids()
        try:
            sampler = Sampler(params, self.model.tokenizer.vocab_size)
            stops = StopStrings(params.stop)
            logits = turn.read(chat.user_turn_ids(self.prompt), self.prompt)
            self.frame = FocusFrame(self.prompt, self.context.entries, self.context.length)
            self._documents.kind = "assistant"
            reason = "length"
            for step in range(params.max_new_tokens):
                token = sampler(logits)
                if step == 0:
                    turn.stats.time_to_first_token = time.perf_counter() - start
                if token in self.model.tokenizer.eos_ids:
                    reason = "stop"
                    break
                logits = turn.step(token)
                piece = stops.push(text.push(token))
                if piece:
                    yield piece
                if stops.hit:
                    reason = "stop"
                    break
            rest = stops.push(text.flush()) + stops.flush()
            if rest:
                yield rest
            turn.stats.finish_reason = reason
        finally:
            turn.finish(end)


class TurnDocuments:
    """Records a turn's tokens in the catalogue: one document for the prompt, one for the answer."""

    def __init__(self, tree: Tree) -> None:
        self.tree, self.kind = tree, "user"
        self.number = 1 + tree.count_documents("user")
        self._open: dict[str, int] = {}

    def record(self, transaction: Transaction, start: int, stop: int) -> None:
        before = self.tree.document_at(start - 1)
        # What an earlier call added may have been rolled back with its transaction.
        if before is not None and before.id == self._open.get(self.kind):
            transaction.extend_document(before.id, stop)
            return
        document = transaction.add_document(
            kind=self.kind, title=f"{self.kind}, turn {self.number}", source=None, start=start, stop=stop,
            ingest="contextual",
        )  # fmt: skip
        self._open[self.kind] = document.id
