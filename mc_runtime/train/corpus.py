"""Texts as token arrays: tokenised once, kept as flat files, sampled in pieces."""

from __future__ import annotations

import hashlib
import lzma
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import InputError
from mc_runtime.model.tokenizer import Tokenizer

# Characters given to the tokenizer at a time.
PIECE = 1 << 20


@dataclass(frozen=True)
class Corpus:
    """One text. ids: [n] uint16 or uint32, mapped from the cache."""

    name: str
    ids: NDArray[np.uint16] | NDArray[np.uint32]
    weight: float = 1.0

    @classmethod
    def open(cls, path: Path, tokenizer: Tokenizer, cache: Path, *, weight: float = 1.0) -> Corpus:
        """Tokenise a `.txt` or `.txt.xz` file, or map what an earlier call made of it.

        The cache is keyed by the file's name, size and time and by the tokenizer's vocabulary. Raises InputError if the
        file cannot be read.
        """
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        try:
            facts = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error})") from error
        name = path.name.removesuffix(".xz").removesuffix(".txt")
        stamp = f"{name} {facts.st_size} {facts.st_mtime_ns} {tokenizer.vocab_size} {tokenizer.encode('stamp 0x2A')}"
        target = cache / f"{name}-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}.{dtype.name}"
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = target.with_suffix(f".{os.getpid()}.part")
            with partial.open("wb") as file:
                for piece in _pieces(path):
                    np.asarray(tokenizer.encode(piece), dtype).tofile(file)
            partial.replace(target)
        return cls(name, np.memmap(target, dtype, "r"), weight)

    def sample(self, rng: random.Random, length: int) -> NDArray[np.int64]:
        """`length` consecutive tokens from anywhere."""
        if len(self.ids) < length:
            raise InputError(f"{self.name}: expected a text of at least {length} tokens, got {len(self.ids)}")
        start = rng.randrange(len(self.ids) - length + 1)
        return self.ids[start : start + length].astype(np.int64)


def _pieces(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")
    except (OSError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable UTF-8 text ({error})") from error
    cuts = [0]
    while cuts[-1] < len(text):
        end = text.find("\n", cuts[-1] + PIECE)
        cuts.append(len(text) if end < 0 else end + 1)
    return [text[a:b] for a, b in pairwise(cuts)]


def sample_mixture(corpora: Sequence[Corpus], rng: random.Random, count: int, length: int) -> NDArray[np.int64]:
    """[count, length] tokens, each row from a corpus that is drawn by weight."""
    weights = [c.weight for c in corpora]
    rows = [rng.choices(corpora, weights)[0].sample(rng, length) for _ in range(count)]
    return np.stack(rows)
