"""Documents: named, disjoint spans of a tree's tokens, with where they came from."""

import dataclasses
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from typing import Any

from mc_runtime.errors import InputError


@dataclasses.dataclass(frozen=True)
class Document:
    """One span [start, stop) of tokens and its provenance."""

    id: int
    """Unique in the tree, from 1 on."""
    kind: str
    """What it is for: "system", "document", "evidence", "user", "assistant", ..."""
    title: str
    source: str | None
    """Where the text came from (a path, a URL), if it has such a place."""
    start: int
    stop: int
    ingest: str
    """How its nodes were made: "contextual", "fast", ..."""
    score: float | None
    """Score of the retrieval that brought it, if one did."""
    sha256: str
    """Hex digest of the span's tokens as little-endian uint32."""
    created: float
    """Unix time in seconds."""
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Anything that JSON can hold."""


class DocumentIndex:
    """Documents by id and in the order of their tokens. Spans that are not empty do not overlap."""

    def __init__(self) -> None:
        self.by_id: dict[int, Document] = {}
        self.last_id = 0
        """Highest id in use, 0 when empty."""
        self.of_kind: Counter[str] = Counter()
        """Documents of each kind."""
        self._order: list[tuple[int, int]] = []

    def put(self, document: Document) -> None:
        """Add `document`, or replace the one with its id (whose start is the same: documents only grow)."""
        if document.id not in self.by_id:
            insort(self._order, (document.start, document.id))
            self.of_kind[document.kind] += 1
        self.by_id[document.id] = document
        self.last_id = max(self.last_id, document.id)

    def in_order(self, start: int = 0) -> list[Document]:
        """The documents that start at token `start` or later, by start, then by id."""
        return [self.by_id[id] for _, id in self._order[bisect_left(self._order, (start, 0)) :]]

    def over(self, start: int, stop: int) -> list[Document]:
        """The documents that have tokens in [start, stop), in their order."""
        first = self.last_before(min(start + 1, stop))
        begun = self._order[bisect_left(self._order, (start + 1, 0)) : bisect_left(self._order, (stop, 0))]
        documents = [self.by_id[id] for _, id in begun]
        return [d for d in ([] if first is None else [first]) + documents if d.stop > max(d.start, start)]

    def last_before(self, token: int, skip: int = 0) -> Document | None:
        """The last document with tokens that starts before `token`, leaving out the one with id `skip`."""
        for place in range(bisect_left(self._order, (token, 0)) - 1, -1, -1):
            document = self.by_id[self._order[place][1]]
            if document.stop > document.start and document.id != skip:
                return document
        return None

    def clash(self, start: int, stop: int, skip: int = 0) -> Document | None:
        """A document (not the one with id `skip`) that shares a token with [start, stop), if there is one."""
        if start == stop:
            return None
        # Spans are disjoint, so the last to start before `stop` is also the last to end.
        last = self.last_before(stop, skip)
        return last if last is not None and last.stop > start else None


class PendingDocuments:
    """What a transaction adds to or changes in the documents of `committed`."""

    def __init__(self, committed: DocumentIndex) -> None:
        self._committed = committed
        self._changed = DocumentIndex()

    def __iter__(self) -> Iterator[Document]:
        return iter(self._changed.by_id.values())

    def get(self, id: int) -> Document:
        """The document as the transaction sees it. Raises `InputError` when there is none with this id."""
        document = self._changed.by_id.get(id) or self._committed.by_id.get(id)
        if document is None:
            raise InputError(f"there is no document with id {id}; documents() lists those there are")
        return document

    def new_id(self) -> int:
        """An id that no document has."""
        return max(self._committed.last_id, self._changed.last_id) + 1

    def check(self, document: Document, length: int) -> None:
        """Raise `InputError` when the span leaves `length` tokens or shares one with another document."""
        start, stop = document.start, document.stop
        if not 0 <= start <= stop <= length:
            raise InputError(f"a document cannot span tokens {start} to {stop}: the tree holds {length} tokens")
        # A document that this transaction extended is found by its old span or by the new one, which contains it.
        other = self._changed.clash(start, stop, document.id) or self._committed.clash(start, stop, document.id)
        if other is not None:
            raise InputError(
                f"tokens {start} to {stop} overlap document {other.id} ({other.title!r}), "
                f"which spans {other.start} to {other.stop}; documents must be disjoint"
            )

    def put(self, document: Document) -> None:
        """Keep a checked document."""
        self._changed.put(document)
