"""Texts of any length to remember, and what is asked of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_runtime.model import Tokenizer, cache_dir

BOOK = Path(__file__).resolve().parents[2] / "examples" / "book" / "fetch.py"
QUESTIONS = (
    "Tell me a long story about what happened to the king, his daughter and the fox.",
    "Who lived in the forest, and what did the old woman give to the children?",
    "How did the youngest brother win the castle? Tell me everything that you know of it.",
    "What did the golden bird and the horse say to the prince?",
)
# Tokens that stay together when the text is repeated.
PIECE = 512
WORDS = (
    "king",
    "fox",
    "forest",
    "daughter",
    "golden",
    "bird",
    "went",
    "said",
    "castle",
    "old",
    "woman",
    "horse",
    "the",
)


class BookError(Exception):
    """The demo's book cannot be had; the message says why in one line."""


def read_book() -> str:
    """The demo's book, fetched on first use. Raises `BookError`."""
    spec = importlib.util.spec_from_file_location("book_fetch", BOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        path: Path = module.fetch_book(cache_dir() / "book")
    except module.FetchError as error:
        raise BookError(f"{error}; --quick needs no book") from error
    return path.read_text(encoding="utf-8")


def made_up_text(words: int) -> str:
    """Random words, for runs that must not need the book."""
    return " ".join(np.random.default_rng(0).choice(WORDS, words))


def history(text: str, tokenizer: Tokenizer, length: int) -> NDArray[np.int64]:
    """`length` token ids: the text, then its pieces again and again, in another order each time."""
    if length < 1:
        raise ValueError(f"length: expected at least 1 token, got {length}")
    ids = np.asarray(tokenizer.encode(text), np.int64)
    pieces = [ids[i : i + PIECE] for i in range(0, len(ids), PIECE)]
    rng, parts, have = np.random.default_rng(0), [ids], len(ids)
    while have < length:
        parts += [pieces[i] for i in rng.permutation(len(pieces))]
        have += len(ids)
    return np.concatenate(parts)[:length]
