"""`Session`: a memory that is read, asked and kept."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, overload

import torch

from .answers import Answer
from .arguments import Span, read_prompts, read_search, read_span
from .batch import answer_prompts
from .config import IngestMode, MemoryConfig
from .errors import InputError
from .focus_map import FocusFrame, FocusMap
from .ingest import Progress
from .messages import message_parts
from .opening import Parts
from .retrieval import Hit
from .sampling import SamplingParams, read_sampling
from .session_life import SessionLife
from .sources import Source, read_evidence, read_source
from .stats import SessionStats, TurnStats
from .tree import Document, Tree


class Session(SessionLife):
    """A memory on disk and the Working Context over it. Open it with `Session.open`, close it or use `with`.

    One session writes to a memory at a time. Not safe for use from several threads at once.
    """

    def __init__(self, path: Path, tree: Tree, config: MemoryConfig, parts: Parts) -> None:
        """Use `Session.open`."""
        super().__init__(path, tree, config, parts)
        self._turns: list[TurnStats] = []
        self._frames: list[FocusFrame] = []

    # -- into the memory --------------------------------------------------------------------------------------------

    def ingest(
        self,
        source: object,
        *,
        title: str | None = None,
        mode: IngestMode | None = None,
        progress: Progress | None = None,
    ) -> Document:
        """Remember a path, text, token ids, or an iterable of pieces; returns the document with its token span.

        The model reads texts one behind the other as they are; a newline follows one that does not end in white space
        (token ids are taken as given). All or nothing: when this raises, the memory is as it was. mode: see
        `mc_runtime.ingest`, by default the configuration's. progress: called with the number of tokens done.
        """
        return self.ingest_source(read_source(source, self.model.tokenizer, title=title), mode=mode, progress=progress)

    def ingest_source(
        self, source: Source, *, mode: IngestMode | None = None, progress: Progress | None = None
    ) -> Document:
        """`ingest` of what `read_source` has already read."""
        self._check_idle()
        mode = mode or self.config.ingest
        if mode not in get_args(IngestMode):
            raise InputError(f"mode: expected one of {', '.join(get_args(IngestMode))}, got {mode!r}")
        return self._ingest([(source, "document")], fast=mode == "fast", progress=progress)[0]

    def ingest_messages(self, messages: Sequence[Mapping[str, str]]) -> list[Document]:
        """Remember a conversation that was held elsewhere, in the model's chat format; all or nothing.

        messages: mappings with `role` (system, user or assistant) and `content`. A question without an answer gets an
        empty one, and the other way round. Returns a document per message, those included. Raises InputError naming
        the message that cannot be used.
        """
        self._check_idle()
        parts = message_parts(messages, self.model, 1 + self.tree.count_documents("user"))
        return self._ingest(parts, fast=self.config.ingest == "fast") if parts else []

    def ingest_evidence(self, hits: Iterable[Mapping[str, Any] | Hit]) -> list[Document]:
        """Remember retrieved passages: mappings with `text`, and `source` and `score` where known; all or nothing.

        They are part of the history from then on, with the claim on the budget of a span in `focus_on`.
        """
        self._check_idle()
        passages = read_evidence(hits, self.model.tokenizer)
        if not passages:
            return []
        sources, scores = [(source, "evidence") for source, _ in passages], [score for _, score in passages]
        documents = self._ingest(sources, fast=self.config.ingest == "fast", scores=scores)
        self.focus.hint_span(documents[0].start, documents[-1].stop)
        return documents

    # -- out of the memory ------------------------------------------------------------------------------------------

    @overload
    def generate(self, prompt: str, *, stream: Literal[True], **sampling: Any) -> Iterator[str]: ...
    @overload
    def generate(self, prompt: str, *, stream: Literal[False] = False, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], *, stream: Literal[False] = False, **sampling: Any) -> list[str]: ...

    def generate(
        self, prompt: str | Sequence[str], *, stream: bool = False, **sampling: Any
    ) -> str | Iterator[str] | list[str]:
        """Answer a prompt as the next turn of the history; or several, each on its own, which are not remembered: each
        has to fit in the budget, and its answer ends where the budget is full (`finish_reason` "length").

        stream: yield text as it comes; the turn is part of the history once the iterator is exhausted or closed.
        sampling: fields of `SamplingParams` (max_new_tokens, temperature, top_p, top_k, seed, stop).
        """
        self._check_idle()
        params = read_sampling(sampling)
        prompts = read_prompts(prompt)
        if not isinstance(prompt, str):
            if stream:
                raise InputError("stream: expected one prompt when streaming, got a list")
            texts, measured = answer_prompts(self.model, self.context, self.focus, prompts, params)
            self._turns += measured
            return texts
        pieces = self._stream(prompt, params)
        self._streams.add(pieces)
        return pieces if stream else "".join(pieces)

    def _stream(self, prompt: str, params: SamplingParams) -> Generator[str, None, None]:
        self._check_idle()  # again: a stream starts when its first piece is asked for
        answer = Answer(self.model, self.context, self.focus, self.builder, prompt, params)
        self._turns.append(answer.stats)
        self._streaming = True
        try:
            yield from answer.pieces()
        finally:
            self._streaming = False
            if answer.frame is not None:
                self._frames.append(answer.frame)

    def search(self, text: str, top: int = 8, *, kinds: Iterable[str] | None = None) -> list[Hit]:
        """The blocks of the history that match a text best (BM25), best first.

        What was asked and answered in the conversation counts less than what was told, by a text or by the user, as it
        does where the memory decides what to look at: an earlier question has all words of this one, and no answer.
        kinds: only what documents of these kinds hold (`document`, `evidence`, `user`, `assistant`, `system`):
        `kinds=["document"]` leaves the conversation out, `kinds=["user"]` finds what was asked.
        """
        return self.retrieval.search(*read_search(text, top, kinds))

    # -- focus ------------------------------------------------------------------------------------------------------

    def focus_on(self, target: str | Span | None) -> None:
        """A hint: bring what matches a text, or a span of tokens, into detail now. A span keeps a claim on the budget
        until the next hint, a text too; None takes it back. A document or a hit of `search` stands for its span."""
        self._check_idle()
        if target is None or isinstance(target, str):
            self.focus.hints = {}
        if target is None:
            return
        query = target if isinstance(target, str) else ""
        label = query
        if not isinstance(target, str):
            start, stop = read_span(target, self.tree.length)
            self.focus.hint_span(start, stop)
            label = f"focus on {start}-{stop}"
        with torch.inference_mode():
            self.focus.refocus(self.context, query=query, reserve=self.config.block_size, new_turn=True)
        self._frames.append(FocusFrame(label, self.context.entries, self.context.length))

    def pin(self, target: Span) -> None:
        """Keep a span at full detail from now on. Raises BudgetError, and pins nothing, if the budget is too small."""
        self._check_idle()
        self.focus.pins.append(read_span(target, self.tree.length))
        try:
            with torch.inference_mode():
                self.focus.refocus(self.context, query="", reserve=self.config.block_size)
        except BaseException:
            self.focus.pins.pop()
            raise

    def unpin(self, target: Span) -> None:
        """Take back a pin."""
        self._check_idle()
        span = read_span(target, self.tree.length)
        if span not in self.focus.pins:
            raise InputError(f"span: {span} is not pinned; pinned are {self.focus.pins}")
        self.focus.pins.remove(span)

    def focus_map(self) -> FocusMap:
        """What stood in the context in what detail at each turn of this session; before the first, what was saved."""
        frames = list(self._frames)
        if not frames and self.context.used:
            frames = [FocusFrame("now", self.context.entries, self.context.length)]
        return FocusMap(frames, [(d.start, d.title) for d in self.tree.documents()])

    def stats(self) -> SessionStats:
        """Sizes, and what each turn of this session took."""
        nodes = {level: self.tree.count(level) for level in range(1, self.tree.n_levels + 1)}
        slots = self.context.entries.per_level()
        documents = self.tree.count_documents()
        return SessionStats(self.tree.length, self.config.budget, slots, nodes, documents, list(self._turns))

    def clear_stats(self) -> None:
        """Forget what `stats` and `focus_map` keep of past turns, which otherwise grows with every one."""
        self._check_idle()
        self._turns.clear()
        self._frames.clear()
