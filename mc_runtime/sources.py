"""What can be ingested: a path, text, token ids, or an iterable of pieces of text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import InputError
from .model import Tokenizer

# A path given as a plain string looks like one: short, one line, and it exists or names a file with a suffix.
_MAX_PATH = 512


@dataclass(frozen=True)
class Source:
    """ids: [n] int64. title: what to call the document. origin: where it came from, or None."""

    ids: NDArray[np.int64]
    title: str
    origin: str | None


def read_source(source: object, tokenizer: Tokenizer, *, title: str | None = None) -> Source:
    """Token ids of anything that can be ingested.

    A `str` that names an existing file is read as one; so is one that only looks like a path (no spaces, a suffix),
    which then has to exist. Any other string is text itself. A newline follows text that does not end in white space.
    Raises InputError with one line for everything that cannot be used: empty, binary or unreadable input, ids that are
    not integers or out of the vocabulary.
    """
    origin: str | None = None
    if isinstance(source, Path) or (isinstance(source, str) and _names_file(source)):
        path = Path(source)
        text, origin = read_text(path), str(path.resolve())
        name = title or path.name
    elif isinstance(source, str):
        text, name = source, title or _first_words(source)
    elif isinstance(source, np.ndarray | torch.Tensor):
        return Source(_check_ids(source, tokenizer), title or "token ids", None)
    elif isinstance(source, Iterable) and not isinstance(source, bytes | bytearray | Mapping | set | frozenset):
        pieces = list(source)
        if pieces and not any(isinstance(piece, str) for piece in pieces):
            return Source(_check_ids(pieces, tokenizer), title or "token ids", None)
        if not all(isinstance(piece, str) for piece in pieces):
            raise InputError("source: expected an iterable of strings or of token ids, got a mixture")
        text = "".join(pieces)
        name = title or _first_words(text)
    else:
        raise InputError(f"source: expected a path, text, token ids or an iterable, got {type(source).__name__}")
    if not text.strip():
        raise InputError(f"source: {origin or 'the text'} is empty; there is nothing to remember")
    # What is told next begins a line: the last word of one text and the first of the next would be read as one.
    ids = np.asarray(tokenizer.encode(text if text[-1].isspace() else text + "\n"), np.int64)
    if not len(ids):
        raise InputError(f"source: {origin or 'the text'} holds no character that the tokenizer knows")
    return Source(ids, name, origin)


def read_evidence(hits: Iterable[object], tokenizer: Tokenizer) -> list[tuple[Source, float | None]]:
    """Passages and their scores, from mappings with `text` and, where known, `source` and `score`, or from objects
    with such attributes. Raises InputError, before anything is used, naming the first that cannot be."""
    if not isinstance(hits, Iterable) or isinstance(hits, str | bytes | Mapping):
        raise InputError(f"hits: expected a list of mappings with a non-empty 'text', got {type(hits).__name__}")
    passages = []
    for number, hit in enumerate(hits):
        fields: Mapping[str, Any] = hit if isinstance(hit, Mapping) else getattr(hit, "__dict__", {})
        text, score = fields.get("text"), fields.get("score")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"hits[{number}]: expected a mapping with a non-empty 'text', got {hit!r}")
        if score is not None and not _is_finite(score):
            raise InputError(f"hits[{number}]: expected a finite number as 'score', got {score!r}")
        origin = str(fields["source"]) if fields.get("source") is not None else None
        ids = np.asarray(tokenizer.encode(text.rstrip() + "\n\n"), np.int64)
        passages.append(
            (Source(ids, origin or f"passage {number + 1}", origin), None if score is None else float(score))
        )
    return passages


def _is_finite(number: object) -> bool:
    try:
        return isinstance(number, int | float | np.integer | np.floating) and math.isfinite(number)
    except OverflowError:  # an integer beyond every float
        return False


def read_text(path: Path) -> str:
    """The text of a UTF-8 file; InputError if it cannot be read or is not text."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error
    return decode_text(raw, str(path))


def decode_text(raw: bytes, name: str) -> str:
    """UTF-8 text, without a byte order mark. name: what the error names that is raised if it is not text."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text (byte {error.start}); convert it to UTF-8 text first") from error
    if "\x00" in text:
        raise InputError(f"{name}: a binary file (it holds zero bytes); give a text file")
    return text


def _names_file(text: str) -> bool:
    if not text or len(text) > _MAX_PATH or "\n" in text or "\0" in text:
        return False
    path = Path(text)
    try:
        exists = path.exists()
    except (OSError, ValueError):
        exists = False
    return exists or (" " not in text and bool(path.suffix[1:].isalpha()) and path.suffix != ".")


def _first_words(text: str) -> str:
    words = text.split(maxsplit=8)[:8]
    return " ".join(words)[:60]


def _check_ids(given: object, tokenizer: Tokenizer) -> NDArray[np.int64]:
    try:
        if isinstance(given, torch.Tensor):  # also one that NumPy has no dtype for, to be named below
            given = given.detach().cpu()
            given = given.float() if given.is_floating_point() else given
        ids: NDArray[np.generic] = np.asarray(given)
    except ValueError as error:
        raise InputError(f"source: expected a list of integer token ids, got a nested one ({error})") from error
    if ids.size == 0:
        raise InputError("source: no token ids; there is nothing to remember")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"source: expected a list of integer token ids, got {ids.dtype} of shape {list(ids.shape)}")
    bad = (ids < 0) | (ids >= tokenizer.vocab_size)  # type: ignore[operator]
    if bad.any():
        at = int(bad.argmax())
        raise InputError(
            f"source: token id {ids[at]} at position {at} is out of range, the vocabulary has {tokenizer.vocab_size}"
        )
    return ids.astype(np.int64)
