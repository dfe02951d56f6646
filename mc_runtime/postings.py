"""Immutable segments of an inverted index: which words occur how often in which documents (here: blocks of text).

A segment is five flat arrays, as in Lucene: the words it knows, where the postings of each begin, and per posting the
document and the count. Words are named by a 64-bit hash, so that segments share no dictionary: they are looked up by
bisection, merged by sorting and mapped from disk without reading them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# Changes whenever the arrays, or the words that a text is taken to consist of, change their meaning.
FORMAT = 1
MAX_COUNT = np.iinfo(np.uint16).max


def word_keys(words: Iterable[str]) -> NDArray[np.int64]:
    """[n] keys of words. Two words of a million share one with a probability of 3e-8."""
    digests = b"".join(hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words)
    return np.frombuffer(digests, "<i8").astype(np.int64)


@dataclass(frozen=True)
class Segment:
    """Postings of `len(lengths)` documents in a row.

    keys [T] int64: sorted. offsets [T+1] int64: word t has the postings offsets[t] .. offsets[t+1].
    docs [P] int32: document within the segment, ascending for each word. counts [P] uint16: occurrences there.
    lengths [n] int32: words of each document.
    """

    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]
    docs: NDArray[np.int32]
    counts: NDArray[np.uint16]
    lengths: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def build(cls, documents: Sequence[Sequence[str]]) -> Segment:
        """From the words of each document, in any order."""
        lengths = np.fromiter((len(d) for d in documents), np.int32, len(documents))
        known = {word: i for i, word in enumerate(dict.fromkeys(word for d in documents for word in d))}
        place = np.fromiter((known[word] for d in documents for word in d), np.int64, int(lengths.sum()))
        keys = word_keys(known)[place]
        docs = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
        order = np.lexsort((docs, keys))
        keys, docs = keys[order], docs[order]
        first = np.ones(len(keys), np.bool_)  # of each run of the same word in the same document
        first[1:] = (keys[1:] != keys[:-1]) | (docs[1:] != docs[:-1])
        starts = first.nonzero()[0]
        counts = np.minimum(np.diff(starts, append=len(keys)), MAX_COUNT).astype(np.uint16)
        return cls._grouped(keys[starts], docs[starts], counts, lengths)

    @classmethod
    def merge(cls, parts: Sequence[Segment]) -> Segment:
        """One segment with the documents of all, in their order."""
        shift = np.cumsum([0, *(len(part) for part in parts)])
        keys = np.concatenate([np.repeat(part.keys, np.diff(part.offsets)) for part in parts])
        docs = np.concatenate([part.docs + np.int32(at) for part, at in zip(parts, shift[:-1], strict=True)])
        counts = np.concatenate([part.counts for part in parts])
        order = np.argsort(keys, kind="stable")  # merges sorted runs, and leaves documents ascending
        return cls._grouped(keys[order], docs[order], counts[order], np.concatenate([part.lengths for part in parts]))

    @classmethod
    def _grouped(
        cls,
        keys: NDArray[np.int64],
        docs: NDArray[np.int32],
        counts: NDArray[np.uint16],
        lengths: NDArray[np.int32],
    ) -> Segment:
        """From postings [P] sorted by word, then document."""
        starts = np.ones(len(keys), np.bool_)
        starts[1:] = keys[1:] != keys[:-1]
        offsets = np.append(starts.nonzero()[0], len(keys)).astype(np.int64)
        return cls(keys[offsets[:-1]], offsets, docs, counts, lengths)

    def find(self, keys: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """[q], [q]: start and stop of the postings of each word; equal where the segment lacks it."""
        if not len(self.keys):
            nothing = np.zeros(len(keys), np.int64)
            return nothing, nothing
        at = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        start = self.offsets[at]
        return start, np.where(self.keys[at] == keys, self.offsets[at + 1], start)

    def save(self, path: Path, about: dict[str, str]) -> None:
        """Write a file that appears whole or not at all; `about` comes back from `load`. Raises OSError."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in vars(self).items()}
        try:
            save_file(arrays, str(temporary), {"format": str(FORMAT), "about": json.dumps(about)})
            os.replace(temporary, path)
        except SafetensorError as error:
            raise OSError(f"{path}: {error}") from error
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, about: dict[str, str]) -> Segment | None:
        """What `save` wrote, as views of the file; None if it was written about something else, or cannot be read."""
        try:
            with safe_open(str(path), "pt") as file:
                said = file.metadata() or {}
                if said.get("format") != str(FORMAT) or said.get("about") != json.dumps(about):
                    return None
                return cls(**{name: file.get_tensor(name).numpy() for name in cls.__dataclass_fields__})
        except (OSError, SafetensorError):
            return None
