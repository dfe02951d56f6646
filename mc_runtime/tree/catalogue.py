"""The SQLite database of a tree: commit log (lengths, flags) and catalogue (spec, documents, state).

A commit is one SQLite transaction. While a writer has the tree open the database is in WAL mode: one sync per
commit, and readers never wait. A clean close puts it back into rollback mode, in which a reader needs no file
beside the database and so can read a tree in a directory that it may not write to.
"""

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from mc_runtime.errors import TreeError
from mc_runtime.tree import storage
from mc_runtime.tree.documents import Document, DocumentIndex
from mc_runtime.tree.flags import FlagRuns
from mc_runtime.tree.spec import TreeSpec

_APPLICATION = 0x4D435452
_VERSION = 1
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE levels (level INTEGER PRIMARY KEY, count INTEGER NOT NULL);
CREATE TABLE flags (level INTEGER, start INTEGER, value INTEGER NOT NULL, PRIMARY KEY (level, start)) WITHOUT ROWID;
CREATE TABLE documents (id INTEGER PRIMARY KEY, kind TEXT, title TEXT, source TEXT, start INTEGER, stop INTEGER,
    ingest TEXT, score REAL, sha256 TEXT, created REAL, metadata TEXT, sequence INTEGER NOT NULL);
CREATE INDEX documents_by_sequence ON documents (sequence);
CREATE TABLE state (key TEXT PRIMARY KEY, value BLOB NOT NULL);
INSERT INTO levels VALUES (0, 0);
"""
_FIELDS = [field.name for field in dataclasses.fields(Document)]
_DOCUMENT = ", ".join(_FIELDS)


@dataclasses.dataclass
class Snapshot:
    """What one commit made of the tree. `sequence` counts the commits, `length` the tokens; levels from 1 on."""

    sequence: int = 0
    length: int = 0
    levels: dict[int, FlagRuns] = dataclasses.field(default_factory=dict)
    documents: DocumentIndex = dataclasses.field(default_factory=DocumentIndex)
    state: dict[str, bytes] = dataclasses.field(default_factory=dict)

    def count(self, level: int) -> int:
        """Nodes at `level`; level 0 are the tokens."""
        if level == 0:
            return self.length
        return self.levels[level].count if level in self.levels else 0


@dataclasses.dataclass
class Changes:
    """What a commit changes. `levels` and `length` are the new content, None in `state` deletes the key."""

    sequence: int
    length: int
    levels: Mapping[int, FlagRuns]
    documents: Iterable[Document]
    state: Mapping[str, bytes | None]


class Catalogue:
    """An open catalogue. Methods raise `sqlite3.Error` as SQLite does, `TreeError` for content that is not a tree's."""

    def __init__(self, path: Path, *, writable: bool, create: TreeSpec | None = None, sync: bool = True) -> None:
        self._path = path
        self._writable = writable
        mode = "ro" if not writable else "rwc" if create else "rw"
        uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
        # The tree allows one writing thread at a time, whichever it is; autocommit, as transactions are explicit.
        self._db = sqlite3.connect(uri, uri=True, timeout=10.0, isolation_level=None, check_same_thread=False)
        try:
            self._require_ours(create)
            if writable:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute(f"PRAGMA synchronous = {'FULL' if sync else 'OFF'}")
            row = self._db.execute("SELECT value FROM meta WHERE key = 'spec'").fetchone()
            self.spec = TreeSpec.from_json(row[0] if row else "")
        except BaseException:
            self._db.close()
            raise

    def _require_ours(self, create: TreeSpec | None) -> None:
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == 0 and tables == 0:
            # Either new, or its maker died before the first commit.
            if create is None:
                raise TreeError(f"there is no tree at {str(self._path.parent)!r} yet: create it with a TreeSpec")
            self._create(create)
        elif application != _APPLICATION:
            raise TreeError(f"{str(self._path)!r} belongs to another program: use another directory")
        elif version != _VERSION:
            raise TreeError(
                f"the tree at {str(self._path.parent)!r} has format {version}, this package reads format {_VERSION}: "
                "use the package that wrote it"
            )

    def _create(self, spec: TreeSpec) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";"):
            self._db.execute(statement)
        self._db.execute("INSERT INTO meta VALUES ('spec', ?), ('sequence', 0)", (spec.to_json(),))
        self._db.execute(f"PRAGMA application_id = {_APPLICATION}")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")
        storage.commit(self._db)

    def load(self, known: Snapshot | None = None) -> Snapshot:
        """The committed content, as one consistent snapshot; `known` if that is still current.

        The documents of `known` are brought forward in place, at a cost that follows what changed.
        """
        self._db.execute("BEGIN")
        try:
            sequence = self._sequence()
            if known is not None and known.sequence == sequence:
                return known
            result = Snapshot(sequence)
            if known is not None:
                result.documents = known.documents
            runs: dict[int, list[tuple[int, int]]] = {}
            for level, start, value in self._db.execute("SELECT level, start, value FROM flags ORDER BY level, start"):
                runs.setdefault(level, []).append((start, value))
            for level, count in self._db.execute("SELECT level, count FROM levels"):
                if level == 0:
                    result.length = int(count)
                else:
                    result.levels[level] = FlagRuns.load(count, runs.get(level, ()))
            since = -1 if known is None else known.sequence
            documents = [
                Document(*(*row[:-1], json.loads(row[-1])))
                for row in self._db.execute(
                    f"SELECT {_DOCUMENT} FROM documents WHERE sequence > ? ORDER BY start, id", (since,)
                )
            ]
            result.state = dict(self._db.execute("SELECT key, value FROM state"))
            # Last, so that `known` stays whole if anything above fails.
            for document in documents:
                result.documents.put(document)
            return result
        except (TypeError, ValueError) as error:
            raise TreeError(f"the catalogue at {str(self._path)!r} is damaged ({error}); restore a backup") from error
        finally:
            # Some errors of SQLite end the transaction by themselves.
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    def _sequence(self) -> int:
        (value,) = self._db.execute("SELECT value FROM meta WHERE key = 'sequence'").fetchone()
        return int(value)

    def commit(self, changes: Changes) -> None:
        """Make `changes` durable, all or nothing."""
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        db.execute("UPDATE meta SET value = ? WHERE key = 'sequence'", (changes.sequence,))
        db.execute("UPDATE levels SET count = ? WHERE level = 0", (changes.length,))
        for level, runs in changes.levels.items():
            db.execute("INSERT OR REPLACE INTO levels VALUES (?, ?)", (level, runs.count))
            for start in runs.touched:
                value = runs.run_at(start)
                if value is None:
                    db.execute("DELETE FROM flags WHERE level = ? AND start = ?", (level, start))
                else:
                    db.execute("INSERT OR REPLACE INTO flags VALUES (?, ?, ?)", (level, start, value))
        db.executemany(
            f"INSERT OR REPLACE INTO documents ({_DOCUMENT}, sequence) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            ((*_fields(document), changes.sequence) for document in changes.documents),
        )
        for key, blob in changes.state.items():
            if blob is None:
                db.execute("DELETE FROM state WHERE key = ?", (key,))
            else:
                db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (key, blob))
        storage.commit(db)

    def holds(self, sequence: int) -> bool:
        """Whether the commit `sequence` took place. Ends an open transaction, undoing it."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        return self._sequence() == sequence

    def check(self) -> None:
        """Raise `TreeError` when SQLite finds the database damaged."""
        (finding,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if finding != "ok":
            finding = " ".join(finding.split())
            raise TreeError(f"the catalogue at {str(self._path)!r} is damaged ({finding}); restore a backup")

    def close(self) -> None:
        """Close the database; a writer leaves it in rollback mode unless a reader is looking just now."""
        if self._writable:
            with suppress(sqlite3.Error):
                self._db.execute("PRAGMA busy_timeout = 100")
                self._db.execute("PRAGMA journal_mode = DELETE")
        self._db.close()


def _fields(document: Document) -> tuple[object, ...]:
    return (*(getattr(document, name) for name in _FIELDS[:-1]), json.dumps(document.metadata))
