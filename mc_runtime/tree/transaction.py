"""A set of additions to a tree that become part of it together, or not at all."""

import dataclasses
import json
import math
import sqlite3
import time
from collections.abc import Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mc_runtime.errors import InputError, TreeError
from mc_runtime.tree import checks
from mc_runtime.tree.catalogue import Changes
from mc_runtime.tree.digests import Digest
from mc_runtime.tree.documents import Document, PendingDocuments
from mc_runtime.tree.flags import FlagRuns
from mc_runtime.tree.spec import NodeFlag
from mc_runtime.tree.storage import as_tree_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mc_runtime.tree.tree import Tree

_UPGRADED = NodeFlag.KV | NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN


class Transaction:
    """Made by `Tree.begin`, used as a context manager: commits at a clean exit, rolls back on an exception.

    Rows go into the files at once, past what is committed, where no reader looks; documents, flags and lengths are
    kept here until the commit. `InputError` leaves the transaction as it was before the call; after any other
    error it cannot go on, and leaving the block rolls it back.
    """

    def __init__(self, tree: "Tree") -> None:
        self._tree = tree
        self._open = False
        self._failed = False
        self._length = 0
        self._levels: dict[int, FlagRuns] = {}
        self._documents = PendingDocuments(tree._snapshot.documents)
        self._digests: dict[int, Digest] = {}
        self._state: dict[str, bytes | None] = {}

    @property
    def length(self) -> int:
        """Tokens, pending ones included."""
        return self._length

    def count(self, level: int) -> int:
        """Nodes at `level`, pending ones included; level 0 are the tokens."""
        if level == 0:
            return self._length
        return self._levels[level].count if level in self._levels else self._tree._snapshot.count(level)

    def append_tokens(self, ids: npt.ArrayLike | Tensor) -> tuple[int, int]:
        """Add token ids `[n]` (any integer dtype); returns their span. Raises `InputError` naming the first bad id."""
        with self._writing():
            stored = checks.token_ids(ids, self._tree.spec.vocab_size)
            start, stop = self._length, self._length + len(stored)
            if len(stored):
                self._tree._layout.tokens.write(start, stored.view(np.uint8))
            self._length = stop
            return start, stop

    def append_nodes(
        self,
        level: int,
        summary: Tensor,
        *,
        hidden: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        contextual: bool,
    ) -> None:
        """Add the next n nodes of `level` >= 1.

        `summary` and `hidden` `[n, E]`, `k` and `v` (both or neither) `[n, L, Hkv, D]`, any floating dtype and
        device; stored in the tree's dtype. Rows that are not given take no space and their flag is not set. Raises
        `InputError` for a wrong shape, a value that is not finite once converted, or nodes whose children are not
        all there yet.
        """
        with self._writing():
            spec, first = self._tree.spec, self.count(level) if level >= 1 else 0
            if level < 1:
                raise InputError(f"nodes have levels from 1 on, not {level}; tokens go through append_tokens")
            if (k is None) != (v is None):
                raise InputError("k and v belong together: give both or neither")
            n = len(summary) if isinstance(summary, Tensor) and summary.ndim else 0
            parts = {"summary": checks.rows(summary, (n, spec.embed_dim), spec.torch_dtype, "summary", first)}
            children = self.count(level - 1)
            if first + n > children // spec.block_size:
                raise InputError(
                    f"{n} nodes at level {level} would make {first + n}, "
                    f"but {children} children at level {level - 1} fill only {children // spec.block_size}"
                )
            flags = NodeFlag.CONTEXTUAL if contextual else NodeFlag(0)
            if hidden is not None:
                flags |= NodeFlag.HIDDEN
            if k is not None:
                flags |= NodeFlag.KV
            parts |= checks.optional_rows(spec, n, first, hidden, k, v, contextual=contextual)
            self._write(level, first, parts)
            self._runs(level).append(n, int(flags))

    def upgrade_nodes(self, level: int, start: int, *, hidden: Tensor, k: Tensor, v: Tensor) -> None:
        """Give the fast nodes [start, start + n) of `level` the rows of contextual ingest, and the flags for them.

        `hidden` `[n, E]`, `k`, `v` `[n, L, Hkv, D]`. Until the commit, and in readers that do not refresh, the
        nodes keep their old rows and flags. Raises `InputError` for nodes that do not exist or are contextual.
        """
        with self._writing():
            n = len(hidden) if isinstance(hidden, Tensor) and hidden.ndim else 0
            checks.span(start, start + n, self.count(level) if level >= 1 else 0, f"nodes of level {level}")
            parts = checks.optional_rows(self._tree.spec, n, start, hidden, k, v, contextual=True)
            runs = self._runs(level)
            contextual = runs.span(start, start + n) & NodeFlag.CONTEXTUAL
            if contextual.any():
                node = start + int(contextual.argmax())
                raise InputError(f"node {node} of level {level} is contextual already; only fast nodes are upgraded")
            self._write(level, start, parts)
            runs.assign(start, start + n, int(_UPGRADED))

    def add_document(
        self,
        *,
        kind: str,
        title: str,
        source: str | None,
        start: int,
        stop: int,
        ingest: str,
        score: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Document:
        """Name the tokens [start, stop), which may be none yet. Raises `InputError` if another document has one."""
        with self._writing():
            try:
                plain = json.loads(json.dumps(dict(metadata or {})))
            except (TypeError, ValueError) as error:
                raise InputError(f"metadata must be what JSON can hold: {error}") from None
            if score is not None and not math.isfinite(score):
                raise InputError(f"score must be finite, not {score}")
            document = Document(
                id=self._documents.new_id(),
                kind=checks.text(kind, "kind"),
                title=checks.text(title, "title"),
                source=None if source is None else checks.text(source, "source"),
                start=int(start),
                stop=int(stop),
                ingest=checks.text(ingest, "ingest"),
                score=None if score is None else float(score),
                sha256="",
                created=time.time(),
                metadata=plain,
            )
            return self._put(document)

    def extend_document(self, id: int, stop: int) -> Document:
        """Let a document end at token `stop`, not before its present end. Costs O(new tokens).

        The first extension after the tree was opened reads the whole document once, to take up its hash. Raises
        `InputError` for an unknown id, a smaller `stop`, or tokens of another document.
        """
        with self._writing():
            old = self._documents.get(id)
            if stop < old.stop:
                raise InputError(f"document {id} ends at token {old.stop} and cannot be cut to {stop}")
            return self._put(dataclasses.replace(old, stop=int(stop)))

    def set_state(self, key: str, value: bytes | None) -> None:
        """Keep a small blob under `key`; None removes it."""
        with self._writing():
            self._state[checks.text(key, "key")] = None if value is None else bytes(value)

    def __enter__(self) -> "Transaction":
        self._tree._claim(self)
        # Only now: another transaction may have been committed since `begin`.
        self._length = self._tree._snapshot.length
        self._open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        tree, self._open = self._tree, False
        try:
            if kind is None and not self._failed and self._pending():
                tree._require_own()
                changes = Changes(
                    tree._snapshot.sequence + 1, self._length, self._levels, list(self._documents), self._state
                )
                tree._commit(changes, self._digests)
                return
            tree._roll_back()
            if kind is None and self._failed:
                raise TreeError("the transaction met an error inside its block and was rolled back; begin another")
        finally:
            tree._release(self)

    def _pending(self) -> bool:
        return bool(self._length != self._tree._snapshot.length or self._levels or self._state or any(self._documents))

    @contextmanager
    def _writing(self) -> "Iterator[None]":
        if not self._open:
            raise TreeError('the transaction is not open: use it inside "with tree.begin() as transaction:"')
        self._tree._require_own()
        if self._failed:
            raise TreeError("the transaction met an error before and cannot go on; leave its block and begin another")
        try:
            yield
        except InputError:
            raise
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError | sqlite3.Error):
                raise as_tree_error(error, self._tree.path, "write to") from error
            raise

    def _runs(self, level: int) -> FlagRuns:
        """This transaction's own copy of a level's flags."""
        if level not in self._levels:
            committed = self._tree._snapshot.levels.get(level)
            self._levels[level] = committed.copy() if committed else FlagRuns()
        return self._levels[level]

    def _write(self, level: int, first: int, parts: Mapping[str, Tensor]) -> None:
        for kind, tensor in parts.items():
            if len(tensor):
                self._tree._layout.level(level, kind).write(first, checks.as_bytes(tensor))

    def _put(self, document: Document) -> Document:
        """Check the document's span, hash its tokens, keep it."""
        self._documents.check(document, self._length)
        sha256 = self._tree._digests.extend(document, self._digests)
        document = dataclasses.replace(document, sha256=sha256)
        self._documents.put(document)
        return document
