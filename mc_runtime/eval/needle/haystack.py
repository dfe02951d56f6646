"""Text to hide facts in, and hiding them: at drawn depths, between sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer
from mc_runtime.train.corpus import Corpus

from ..readers.base import History, Span, Tokens

# Low-entropy filler of Mohtashami & Jaggi (2023), as RULER has it.
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Tokens on either side of a fact that are read with it where the rest of a history is not.
MARGIN = 64


def noise(tokenizer: Tokenizer, length: int) -> Tokens:
    """`length` tokens of the low-entropy filler."""
    ids = np.asarray(tokenizer.encode(" " + NOISE), np.int64)
    return np.resize(ids, length)


def prose(corpora: Sequence[Corpus], rng: random.Random, length: int) -> Tokens:
    """`length` tokens of real text from a drawn place on, one text after another; from the start again at the end, so
    that a history longer than all texts repeats them."""
    total = sum(len(c.ids) for c in corpora)
    if total == 0:
        raise InputError("texts: expected at least one token, got none")
    at = rng.randrange(total)
    parts, missing = [], length
    while missing > 0:
        for corpus in corpora:
            if at >= len(corpus.ids):
                at -= len(corpus.ids)
                continue
            part = np.asarray(corpus.ids[at : at + missing], np.int64)
            parts.append(part)
            missing, at = missing - len(part), 0
            if missing <= 0:
                break
    return np.concatenate(parts)


def sentence_ends(tokenizer: Tokenizer, ids: Tokens) -> NDArray[np.int64]:
    """Sorted places i such that a sentence or line ends with token i - 1; place 0 included."""
    ends = [i for i in np.unique(ids).tolist() if tokenizer.decode([i]).endswith((".", "!", "?", "\n"))]
    places = np.flatnonzero(np.isin(ids, np.asarray(ends, np.int64))) + 1
    return np.concatenate(([0], places)).astype(np.int64)


def draw_depths(rng: random.Random, count: int) -> list[float]:
    """`count` depths in [0, 1), one from each of as many equal parts, in mixed order."""
    depths = [(i + rng.random()) / count for i in range(count)]
    rng.shuffle(depths)
    return depths


def plant(
    filler: Tokens, ends: NDArray[np.int64], needles: Sequence[Sequence[int]], depths: Sequence[float]
) -> tuple[Tokens, list[Span]]:
    """`filler` with each needle put where a sentence ends, nearest to its depth of the whole; and where each came to
    stand, in the order given.

    needles: token ids. depths: shares of the whole, in [0, 1). ends: as `sentence_ends` gives them.
    """
    total = len(filler) + sum(len(needle) for needle in needles)
    order = sorted(range(len(needles)), key=lambda i: depths[i])
    spans: dict[int, Span] = {}
    parts: list[Tokens] = []
    at = planted = 0
    for i in order:
        wanted = min(max(depths[i] * total - planted, at), len(filler))
        right = int(np.searchsorted(ends, wanted))
        near = [int(ends[j]) for j in (right - 1, right) if 0 <= j < len(ends) and ends[j] >= at]
        cut = min(near, key=lambda place: abs(place - wanted), default=at)
        needle = np.asarray(needles[i], np.int64)
        parts += [filler[at:cut], needle]
        spans[i] = Span(cut + planted, cut + planted + len(needle))
        planted, at = planted + len(needle), cut
    parts.append(filler[at:])
    return np.concatenate(parts), [spans[i] for i in range(len(needles))]


def history_of(ids: Tokens, spans: Sequence[Span], read_limit: int) -> History:
    """All is read up to `read_limit` tokens; of a longer history only what stands around `spans`."""
    if len(ids) <= read_limit:
        return History(ids)
    read: list[tuple[int, int]] = []
    for span in sorted(spans, key=lambda s: s.start):
        start, stop = max(0, span.start - MARGIN), min(len(ids), span.stop + MARGIN)
        if read and start <= read[-1][1]:
            read[-1] = (read[-1][0], max(stop, read[-1][1]))
        else:
            read.append((start, stop))
    return History(ids, tuple(read))
