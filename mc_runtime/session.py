"""`Session`: a memory that is read, asked and kept."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args, overload

import numpy as np
import torch

from .answers import Answer
from .arguments import Span, read_prompts, read_search, read_span
from .batch import answer_batch
from .config import DEFAULT_SYSTEM_PROMPT, IngestMode, MemoryConfig
from .context import WorkingContext
from .engines import CacheEngine
from .errors import InputError
from .focus import make_policy
from .focus.controller import FocusController
from .focus.view import FocusPolicy
from .focus_map import FocusFrame, FocusMap
from .gists import gist_reader
from .ingest import Progress, ingest_documents
from .messages import message_parts
from .model import DEFAULT_MODEL, LoadedModel
from .nodes import NodeBuilder
from .opening import Parts, check_room, load_parts, read_settings
from .retrieval import BlockIndex, Hit
from .sampling import SamplingParams, StopStrings, read_sampling
from .shipped import SHIPPED
from .snapshot import load_snapshot, save_snapshot
from .sources import Source, read_evidence, read_source
from .stats import SessionStats, TurnStats
from .tree import Document, Tree

logger = logging.getLogger("mc_runtime")
# Prompts of a list that are answered together: each has a copy of the cache.
BATCH_ROWS = 16


class Session:
    """A memory on disk and the Working Context over it. Open it with `Session.open`, close it or use `with`.

    One session writes to a memory at a time. Not safe for use from several threads at once.
    """

    def __init__(self, path: Path, tree: Tree, config: MemoryConfig, parts: Parts) -> None:
        """Use `Session.open`."""
        model = parts.model
        self.path, self.tree, self.model, self.config = path, tree, model, config
        self.engine = parts.engine
        self.builder = NodeBuilder(tree, parts.gistnet)
        cache = self.engine.allocate(config.budget, weighted=bool(config.gist_bias))
        reader = gist_reader(config.gist_kind, model.decoder, parts.gistnet)
        self.context = WorkingContext(tree, self.engine, reader, config, cache)
        self.retrieval = BlockIndex(tree, model.tokenizer, path)
        self._turns: list[TurnStats] = []
        self._frames: list[FocusFrame] = []
        self._streaming = self._closed = False
        self._streams: weakref.WeakSet[Generator[str, None, None]] = weakref.WeakSet()
        if tree.length == 0:
            self._write_head()
        else:
            self._compare_head()
        head = tree.documents()[0].stop
        self.focus = FocusController(make_policy(config.policy, parts.lensnet), config, self.retrieval, head)
        load_snapshot(path, tree, self.context, self.focus)

    @classmethod
    def open(
        cls,
        path: Path | str,
        model: str | Path | LoadedModel = DEFAULT_MODEL,
        *,
        gistnet: Path | str | None = SHIPPED,
        lensnet: Path | str | None = None,
        config: MemoryConfig | None = None,
        policy: FocusPolicy | str | None = None,
        engine: str | CacheEngine = "native",
        **settings: Any,
    ) -> Session:
        """Create a memory in a directory, or reopen it where it stopped.

        model: a name or path (see `load_model`) or a loaded model. gistnet: trained weights: a safetensors file,
        `shipped` (the package's, where it has some for the model, else untrained ones) or `untrained`. lensnet: those
        of the policies `lensnet` and `lensnet+retrieval`; by default the package's. config and settings: see
        `MemoryConfig`; settings (`budget=2048`, ...) override. policy: a name, or a focus policy of your own.
        engine: what runs the model, `native` or `transformers`; a memory may be opened with either at any time.
        Raises TreeMismatchError if the memory was made with another model, tokenizer, GistNet or block size,
        TreeLockedError if another process writes to it, InputError and BudgetError for unusable settings.
        """
        if isinstance(policy, str):
            settings["policy"], policy = policy, None
        config = read_settings(config, settings, has_lensnet=lensnet is not None)
        parts = load_parts(model, config, gistnet, lensnet, engine)
        if config.gist_bias is None:
            asked = parts.gistnet.gist_bias if config.gist_kind == "pooled" else 0.0
            config = replace(config, gist_bias=asked)
        tree = Tree.open(path, parts.spec)
        try:
            session = cls(Path(path), tree, config, parts)
        except BaseException:
            tree.close()
            raise
        if policy is not None:
            session.focus.policy = policy
        return session

    def _write_head(self) -> None:
        """The system prompt opens the history; its first token is the attention sink."""
        ids = np.asarray(self.model.chat.system_ids(self.config.system_prompt), np.int64)
        if not len(ids):
            raise InputError("system_prompt: expected text that gives at least one token, got none")
        check_room(len(ids), self.config)
        self._ingest([(Source(ids, "system prompt", None), "system")], fast=False)

    def _compare_head(self) -> None:
        head, given = self.tree.documents()[0], self.config.system_prompt
        ids = [] if given == DEFAULT_SYSTEM_PROMPT else self.model.chat.system_ids(given)
        if ids and self.tree.tokens(head.start, head.stop).tolist() != ids:
            logger.warning("system_prompt: the memory keeps the one that it was made with, another was given")

    def close(self) -> None:
        """Save the Working Context and release the memory. An answer that is still streaming ends here and is kept.
        Closing twice is fine."""
        if self._closed:
            return
        try:
            for stream in list(self._streams):
                stream.close()
            save_snapshot(self.path, self.tree, self.context, self.focus)
            self.retrieval.save()
        finally:
            self._closed = True
            self.tree.close()

    def save(self) -> None:
        """Save the Working Context; the text itself is safe from the moment that a call returns."""
        self._check_idle()
        save_snapshot(self.path, self.tree, self.context, self.focus)
        self.retrieval.save()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

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

        All or nothing: when this raises, the memory is as it was. mode: see `mc_runtime.ingest`, by default the
        configuration's. progress: called with the number of tokens done.
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
        """Remember retrieved passages: mappings with `text`, and `source` and `score` where known.

        They are part of the history from then on, at full detail until the focus moves.
        """
        self._check_idle()
        passages = read_evidence(hits, self.model.tokenizer)
        fast = self.config.ingest == "fast"
        documents = [self._ingest([(s, "evidence")], fast=fast, score=score)[0] for s, score in passages]
        if documents:
            self.focus.hint_span(documents[0].start, documents[-1].stop)
        return documents

    def _ingest(
        self,
        parts: Sequence[tuple[Source, str]],
        *,
        fast: bool,
        progress: Progress | None = None,
        score: float | None = None,
    ) -> list[Document]:
        documents = ingest_documents(
            self.tree, self.builder, self.engine, self.config, parts, fast=fast, progress=progress, score=score
        )
        self.retrieval.update()  # now, where time goes with the text, and not when the first question waits
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
            return self._generate_batch(prompts, params)
        pieces = self._stream(prompt, params)
        self._streams.add(pieces)
        return pieces if stream else "".join(pieces)

    def _generate_batch(self, prompts: list[str], params: SamplingParams) -> list[str]:
        with torch.inference_mode():
            self.focus.make_room(self.context, 0)  # brings in what was ingested, once for all branches
        answers, stats = list[list[int]](), list[TurnStats]()
        for first in range(0, len(prompts), BATCH_ROWS):
            part = prompts[first : first + BATCH_ROWS]
            said, measured = answer_batch(self.model, self.context, self.focus, part, params)
            answers, stats = answers + said, stats + measured
        self._turns += stats
        texts = []
        for ids, turn in zip(answers, stats, strict=True):
            stops = StopStrings(params.stop)
            texts.append(stops.push(self.model.tokenizer.decode(ids)) + stops.flush())
            if stops.hit:
                turn.finish_reason = "stop"
        return texts

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
        until the next hint; None takes it back. A document or a hit of `search` stands for its span."""
        self._check_idle()
        if target is None:
            self.focus.hints = {}
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

    def _check_idle(self) -> None:
        if self._closed:
            raise InputError("session: it is closed; open the memory again")
        if self._streaming:
            raise InputError("session: an answer is still streaming; exhaust or close its iterator first")
