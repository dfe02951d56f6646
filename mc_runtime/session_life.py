"""How a session begins and ends: its parts, the head of the history, what is saved."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .config import DEFAULT_SYSTEM_PROMPT, MemoryConfig
from .context import WorkingContext
from .engines import CacheEngine
from .errors import InputError
from .focus import make_policy
from .focus.controller import FocusController
from .focus.view import FocusPolicy
from .gists import gist_reader
from .ingest import Progress, ingest_documents
from .model import DEFAULT_MODEL, LoadedModel
from .nodes import NodeBuilder
from .opening import Parts, check_policy, check_room, load_parts, read_settings
from .retrieval import BlockIndex
from .shipped import SHIPPED
from .snapshot import load_snapshot, save_snapshot
from .sources import Source
from .tree import Document, Tree
from .tree.layout import CATALOGUE

logger = logging.getLogger("mc_runtime")


class SessionLife:
    """A memory that is open: its parts, and the calls that open, save and close it. Of `Session` alone."""

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
    ) -> Self:
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
        elif policy is not None:
            check_policy(policy)
        config = read_settings(config, settings, has_lensnet=lensnet is not None)
        parts = load_parts(model, config, gistnet, lensnet, engine)
        if config.gist_bias is None:
            asked = parts.gistnet.gist_bias if config.gist_kind != "embedding" else 0.0
            config = replace(config, gist_bias=asked)
        if not os.path.exists(Path(path) / CATALOGUE):
            _head_ids(parts.model, config)  # what cannot be made leaves no empty memory with settings of its own
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
        ids = _head_ids(self.model, self.config)
        self._ingest([(Source(np.asarray(ids, np.int64), "system prompt", None), "system")], fast=False)

    def _compare_head(self) -> None:
        head, given = self.tree.documents()[0], self.config.system_prompt
        ids = [] if given == DEFAULT_SYSTEM_PROMPT else self.model.chat.system_ids(given)
        if ids and self.tree.tokens(head.start, head.stop).tolist() != ids:
            logger.warning("system_prompt: the memory keeps the one that it was made with, another was given")

    def _ingest(
        self,
        parts: Sequence[tuple[Source, str]],
        *,
        fast: bool,
        progress: Progress | None = None,
        scores: Sequence[float | None] | None = None,
    ) -> list[Document]:
        documents = ingest_documents(
            self.tree, self.builder, self.engine, self.config, parts, fast=fast, progress=progress, scores=scores
        )
        self.retrieval.update()  # now, where time goes with the text, and not when the first question waits
        return documents

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_idle(self) -> None:
        if self._closed:
            raise InputError("session: it is closed; open the memory again")
        if self._streaming:
            raise InputError("session: an answer is still streaming; exhaust or close its iterator first")


def _head_ids(model: LoadedModel, config: MemoryConfig) -> list[int]:
    """Tokens of the system prompt. Raises InputError and BudgetError for one that no memory can begin with."""
    ids = model.chat.system_ids(config.system_prompt)
    if not len(ids):
        raise InputError("system_prompt: expected text that gives at least one token, got none")
    check_room(len(ids), config)
    return ids
