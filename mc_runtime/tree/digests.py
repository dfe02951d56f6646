"""SHA-256 of documents that grow: each extension hashes only its own tokens."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mc_runtime.tree.arrays import ArrayFile
from mc_runtime.tree.documents import Document

_KEPT = 64


class Digest(NamedTuple):
    """The running hash of a document's tokens up to token `stop`."""

    stop: int
    hasher: Any


class Digests:
    """Running hashes of the documents that grew last.

    A running hash cannot be stored, so after opening a tree the first extension of a document reads it once from
    its start (some 40 MB for ten million tokens).
    """

    def __init__(self, tokens: ArrayFile) -> None:
        self._tokens = tokens
        self._known: dict[int, Digest] = {}

    def extend(self, document: Document, pending: dict[int, Digest]) -> str:
        """Hex digest of the document's tokens; the running hash goes to `pending`, whose entries count first."""
        known = pending.get(document.id) or self._known.get(document.id)
        if known is None or known.stop > document.stop:
            known = Digest(document.start, hashlib.sha256())
        hasher = known.hasher.copy()
        hasher.update(self._tokens.read(known.stop, document.stop).reshape(-1))
        pending[document.id] = Digest(document.stop, hasher)
        return str(hasher.hexdigest())

    def keep(self, pending: Mapping[int, Digest]) -> None:
        """Take over what a committed transaction computed; the oldest go first when there are many."""
        for id, digest in pending.items():
            self._known.pop(id, None)
            self._known[id] = digest
        for id in list(self._known)[:-_KEPT]:
            del self._known[id]
