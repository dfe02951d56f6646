"""`ServedSession`: a memory whose model is run by an engine that takes prompt embeddings (vLLM)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, overload

import numpy as np
import torch

from .answers import TurnDocuments
from .arguments import read_prompts, read_search
from .config import MemoryConfig
from .engines import Engine
from .errors import BudgetError, InputError
from .focus import make_policy
from .focus.controller import FocusController
from .gists import EmbeddingReader
from .ingest import Progress, ingest_documents
from .model import LoadedModel
from .nodes import NodeBuilder
from .opening import Parts, load_parts, read_settings
from .prompt_context import PromptContext
from .retrieval import BlockIndex, Hit
from .sampling import SamplingParams, StopStrings, read_sampling
from .served_turns import ServedTurn, ask
from .shipped import SHIPPED
from .sources import Source, read_source
from .stats import TurnStats
from .tree import Document, Tree

# What an engine that only reads vectors can show, and what can be known without its attention.
DEFAULTS: dict[str, Any] = {"gist_kind": "embedding", "ingest": "fast", "policy": "retrieval"}
STATE = "served"
logger = logging.getLogger("mc_runtime")


class ServedSession:
    """A memory on disk, its Working Context, and an engine elsewhere that reads it. Use `open`, then `close` or `with`.

    The history is read by GistNet alone (fast ingest); the base model runs in the engine and nowhere else. The memory
    is the same as a `Session`'s, which may open it too, when the other is closed. Many may share one engine. turns:
    what each turn measured (`decode`: seconds per token of a request, the reading of its context included).
    """

    def __init__(self, path: Path, tree: Tree, config: MemoryConfig, parts: Parts, engine: Engine) -> None:
        """Use `ServedSession.open`."""
        model = parts.model
        self.path, self.tree, self.model, self.config, self.engine = path, tree, model, config, engine
        self.builder = NodeBuilder(tree, parts.gistnet)
        self.context = PromptContext(tree, engine, EmbeddingReader(model.decoder, parts.gistnet), config)
        self.retrieval = BlockIndex(tree, model.tokenizer, path)
        self.turns: list[TurnStats] = []
        self._native, self._busy, self._closed = parts.engine, False, False
        if tree.length == 0:
            ids = np.asarray(model.chat.system_ids(config.system_prompt), np.int64)
            if not len(ids):
                raise InputError("system_prompt: expected text that gives at least one token, got none")
            self._ingest(Source(ids, "system prompt", None), "system", None)
        head = tree.documents()[0].stop
        self.focus = FocusController(make_policy(config.policy, parts.lensnet), config, self.retrieval, head)
        self._load()

    @classmethod
    def open(
        cls,
        path: Path | str,
        engine: Engine,
        model: LoadedModel,
        *,
        gistnet: Path | str | None = SHIPPED,
        lensnet: Path | str | None = None,
        config: MemoryConfig | None = None,
        **settings: Any,
    ) -> ServedSession:
        """Create or reopen a memory. engine: over the decoder of `model`. Other arguments: see `Session.open`; without
        a `config` the settings begin as `DEFAULTS`.

        Raises what `Session.open` raises, and InputError for settings that such an engine cannot serve: gists that are
        not vectors, contextual ingest, weighted gists, policies that need attention mass.
        """
        settings = settings if config is not None else DEFAULTS | settings
        config = read_settings(config, settings, has_lensnet=lensnet is not None)
        for name, wanted in (("gist_kind", "embedding"), ("ingest", "fast")):
            if getattr(config, name) != wanted:
                raise InputError(
                    f'{name}: expected "{wanted}" where an engine reads vectors, got {getattr(config, name)!r}'
                )
        if config.gist_bias:
            raise InputError(f"gist_bias: expected 0, such an engine weighs all entries alike, got {config.gist_bias}")
        if engine.decoder is not model.decoder:
            raise InputError("engine: expected one over the decoder of `model`, got one over another")
        parts = load_parts(model, config, gistnet, lensnet, "native")
        if make_policy(config.policy, parts.lensnet).needs_mass:
            raise InputError(f"policy: {config.policy} needs attention mass, which such an engine does not give; "
                             "give retrieval, recency, retrieval+recency, lensnet or lensnet+retrieval")  # fmt: skip
        tree = Tree.open(path, parts.spec)
        try:
            return cls(Path(path), tree, config, parts, engine)
        except BaseException:
            tree.close()
            raise

    def close(self) -> None:
        """Save the layout and release the memory. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        try:
            state = {
                "length": self.tree.length,
                "counts": list(self.context.counts_seen),
                "expanded": {str(level): nodes.tolist() for level, nodes in self.context.expanded.items()},
                "focus": self.focus.state(),
            }
            with self.tree.begin() as transaction:
                transaction.set_state(STATE, json.dumps(state).encode())
            self.retrieval.save()
        finally:
            self.tree.close()

    def _load(self) -> None:
        raw = self.tree.state(STATE)
        if raw is None:
            return
        state: dict[str, Any] = json.loads(raw)
        self.focus.load_state(state["focus"])
        if state["length"] == self.tree.length and state["counts"]:
            expanded = {int(level): np.asarray(nodes, np.int64) for level, nodes in state["expanded"].items()}
            try:
                self.context.relayout(expanded)
            except BudgetError:
                logger.info("the budget is smaller than when the layout was saved; it is rebuilt")

    def __enter__(self) -> ServedSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ingest(self, source: object, *, title: str | None = None, progress: Progress | None = None) -> Document:
        """Remember a path, text, token ids, or an iterable of pieces, all or nothing; see `Session.ingest`."""
        self._check_idle()
        return self._ingest(read_source(source, self.model.tokenizer, title=title), "document", progress)

    def _ingest(self, source: Source, kind: str, progress: Progress | None) -> Document:
        (document,) = ingest_documents(
            self.tree, self.builder, self._native, self.config, [(source, kind)], fast=True, progress=progress
        )
        self.retrieval.update()
        return document

    @overload
    def generate(self, prompt: str, **sampling: Any) -> str: ...
    @overload
    def generate(self, prompt: Sequence[str], **sampling: Any) -> list[str]: ...

    def generate(self, prompt: str | Sequence[str], **sampling: Any) -> str | list[str]:
        """Answer a prompt as the next turn; or several at once, each on its own, which are not remembered: such an
        answer ends where the budget is full. sampling: fields of `SamplingParams`."""
        params = read_sampling(sampling)
        prompts = read_prompts(prompt)
        if isinstance(prompt, str):
            return "".join(self._answer(prompt, params))
        self._check_idle()
        return self._answer_all(prompts, params)

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """`generate` in pieces, one for the K tokens from one refocus to the next. The turn is part of the history once
        the iterator is exhausted or closed."""
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError("prompt: expected text that is not empty")
        return self._answer(prompt, read_sampling(sampling))

    def search(self, text: str, top: int = 8, *, kinds: Iterable[str] | None = None) -> list[Hit]:
        """The blocks of the history that match a text best (BM25), best first; see `Session.search`."""
        return self.retrieval.search(*read_search(text, top, kinds))

    def _answer(self, prompt: str, params: SamplingParams) -> Iterator[str]:
        self._check_idle()
        self._busy, documents = True, TurnDocuments(self.tree)
        turn = ServedTurn(self.model, self.context, self.focus, lambda c: c.commit(self.builder, documents.record))
        self.turns.append(turn.stats)
        text, stops = self.model.tokenizer.stream_decoder(), StopStrings(params.stop)
        try:
            turn.read(prompt)
            documents.kind = "assistant"
            while not turn.ended and len(turn.generated) < params.max_new_tokens:
                (tokens,), asked = ask(self.engine, [turn], params)
                shown, kept = "", 0
                while kept < len(tokens) and not stops.hit:
                    shown, kept = shown + stops.push(text.push(tokens[kept])), kept + 1
                turn.take(tokens[:kept], asked)
                turn.ended |= stops.hit
                if shown:
                    yield shown
            rest = stops.push(text.flush()) + stops.flush()
            if rest:
                yield rest
        finally:
            self._busy = False
            turn.finish(self.model.chat.assistant_end_ids())

    def _answer_all(self, prompts: list[str], params: SamplingParams) -> list[str]:
        """One call of the engine for all branches, from one refocus to the next."""
        with torch.inference_mode():
            self.focus.make_room(self.context, 0)
        turns = [ServedTurn(self.model, self.context.fork(), self.focus.branch(), None) for _ in prompts]
        for turn, text in zip(turns, prompts, strict=True):
            turn.read(text)
        active = turns
        while active:
            answers, asked = ask(self.engine, active, params)
            for turn, tokens in zip(active, answers, strict=True):
                try:
                    turn.take(tokens, asked)
                except BudgetError:  # full: nothing of a list is remembered, and so nothing of it can be collapsed
                    turn.ended = True
            active = [t for t in active if not t.ended and len(t.generated) < params.max_new_tokens]
        self.turns += [turn.stats for turn in turns]
        texts = []
        for turn in turns:
            stops = StopStrings(params.stop)
            texts.append(stops.push(self.model.tokenizer.decode(turn.generated)) + stops.flush())
        return texts

    def _check_idle(self) -> None:
        if self._closed:
            raise InputError("session: it is closed; open the memory again")
        if self._busy:
            raise InputError("session: an answer is still streaming; exhaust or close its iterator first")
