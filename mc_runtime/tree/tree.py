"""The MegaContext Tree on disk: tokens, nodes of every level, documents and session state."""

import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Literal

from mc_runtime.errors import InputError, TreeError
from mc_runtime.tree import storage
from mc_runtime.tree.catalogue import Catalogue, Changes, Snapshot
from mc_runtime.tree.digests import Digest, Digests
from mc_runtime.tree.layout import Layout
from mc_runtime.tree.lock import WriterLock
from mc_runtime.tree.opening import open_catalogue
from mc_runtime.tree.reading import TreeReads
from mc_runtime.tree.spec import TreeSpec
from mc_runtime.tree.storage import as_tree_error, tree_errors
from mc_runtime.tree.transaction import Transaction
from mc_runtime.tree.verifying import verify


class Tree(TreeReads):
    """An append-only tree in a directory: one writer, any number of snapshot readers.

    Reads give committed content only. Arrays and tensors that are views of the files are read-only (numpy enforces
    it; a write through a tensor ends the process) and stay valid after `close`. Any thread may read; one thread at
    a time may write. After a fork the child may only read.
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        spec: TreeSpec | None = None,
        *,
        mode: Literal["r", "w"] = "w",
        create: bool = True,
        sync: bool = True,
    ) -> "Tree":
        """Open the tree in directory `path`.

        Mode "w" takes the writer's lock, makes the tree if there is none (`create`, for which `spec` is needed) and
        cuts what an interrupted writer left behind. Mode "r" sees what was committed when it was opened, takes no
        lock and changes nothing. `sync=False` survives the death of the process, not that of the machine.
        Raises `TreeMismatchError` when `spec` is not the stored one, `TreeLockedError` when another writer has the
        tree, `TreeError` for anything that is no usable tree.
        """
        if mode not in ("r", "w"):
            raise InputError(f'mode must be "r" or "w", not {mode!r}')
        root = Path(path).absolute()
        with tree_errors(root, "open"):
            catalogue, lock = open_catalogue(root, spec if create else None, writable=mode == "w", sync=sync)
            try:
                if spec is not None:
                    catalogue.spec.require(spec, root)
                return cls(root, catalogue, lock, sync)
            except BaseException:
                catalogue.close()
                if lock is not None:
                    lock.release()
                raise
            finally:
                # A reader keeps nothing open in the database, so that it never holds a writer up.
                if lock is None:
                    catalogue.close()

    def __init__(self, path: Path, catalogue: Catalogue, lock: WriterLock | None, sync: bool) -> None:
        """Use `Tree.open`. `lock` is None for a reader."""
        self.path = path
        self.spec = catalogue.spec
        self.mode: Literal["r", "w"] = "r" if lock is None else "w"
        self._catalogue = catalogue
        self._lock = lock
        self._sync = sync
        self._pid = os.getpid()
        self._closed = False
        self._unsettled = False
        self._transaction: Transaction | None = None
        self._snapshot = catalogue.load()
        self._layout = Layout(path, self.spec, writable=lock is not None)
        self._layout.check(self._snapshot.length, self._snapshot.levels)
        if lock is not None:
            self._layout.cut(self._snapshot.length, self._snapshot.levels)
            if sync:
                # The names of files that an interrupted writer made may not be on the device yet.
                storage.sync_directory(path)
        self._digests = Digests(self._layout.tokens)

    def begin(self) -> Transaction:
        """A transaction, to be used as a context manager; one at a time."""
        self._require_writable()
        return Transaction(self)

    def refresh(self) -> None:
        """Let a reader see what has been committed since; in a writer nothing."""
        self._require_open()
        if self._lock is None:
            with tree_errors(self.path, "read"):
                catalogue, _ = open_catalogue(self.path, None, writable=False, sync=False)
                try:
                    self._snapshot = catalogue.load(self._snapshot)
                finally:
                    catalogue.close()

    def verify(self) -> None:
        """Check what must always hold, the hashes of the documents included; raises `TreeError`. O(tokens)."""
        self._require_open()
        verify(self)

    def close(self) -> None:
        """Give the files and the lock back; an open transaction is rolled back. May be called again."""
        if self._closed:
            return
        self._roll_back()
        self._closed = True
        if self._lock is not None and self._pid == os.getpid():
            self._catalogue.close()
        self._layout.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    def _require_own(self) -> None:
        self._require_open()
        if self._pid != os.getpid():
            raise TreeError("a forked process cannot write to its parent's tree: write from the parent")

    def _require_writable(self) -> None:
        self._require_own()
        if self._lock is None:
            raise TreeError(f'the tree at {str(self.path)!r} is open for reading: open it with mode="w" to change it')
        if self._unsettled:
            raise TreeError("a commit was interrupted and its outcome is not known: close the tree and open it again")
        if self._transaction is not None:
            raise TreeError("another transaction is open: end it first")

    def _claim(self, transaction: Transaction) -> None:
        self._require_writable()
        self._transaction = transaction

    def _release(self, transaction: Transaction) -> None:
        if self._transaction is transaction:
            self._transaction = None

    def _commit(self, changes: Changes, digests: Mapping[int, Digest]) -> None:
        # From here to the end of `_publish`, memory and disk may differ. Whatever ends this early (Ctrl-C too)
        # leaves the mark, and with it a tree that refuses to write until it is opened anew.
        self._unsettled = True
        try:
            if self._sync:
                self._layout.sync()
            self._catalogue.commit(changes)
        except BaseException as error:
            if self._took_place(changes.sequence):
                self._publish(changes, digests)
                if isinstance(error, OSError | sqlite3.Error):
                    return
                raise
            self._unsettled = False
            self._roll_back()
            if isinstance(error, OSError | sqlite3.Error):
                raise as_tree_error(error, self.path, "write to") from error
            raise
        self._publish(changes, digests)

    def _took_place(self, sequence: int) -> bool:
        try:
            return self._catalogue.holds(sequence)
        except sqlite3.Error as error:
            raise TreeError(
                f"the catalogue of the tree at {str(self.path)!r} failed while committing ({error}): "
                "close the tree and open it again to see what was kept"
            ) from error

    def _publish(self, changes: Changes, digests: Mapping[int, Digest]) -> None:
        old = self._snapshot
        for document in changes.documents:
            old.documents.put(document)
        state = {**old.state, **changes.state}
        self._snapshot = Snapshot(
            changes.sequence,
            changes.length,
            {**old.levels, **changes.levels},
            old.documents,
            {key: value for key, value in state.items() if value is not None},
        )
        self._digests.keep(digests)
        self._unsettled = False

    def _roll_back(self) -> None:
        """Cut the files to what is committed, where that is known and this process is the writer."""
        if self._lock is not None and not (self._closed or self._unsettled) and self._pid == os.getpid():
            self._layout.cut_back(self._snapshot.length, self._snapshot.levels)
