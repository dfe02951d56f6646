"""RULER's two tasks about a whole text, common and frequent words; see `ruler`. One question per history."""

from __future__ import annotations

import random
import string
from collections.abc import Callable

import numpy as np

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer

from ..readers import History, Question, Span
from .case import Case
from .ruler import RulerTask

COMMON_INTRO = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
COMMON_PROMPT = "What are the 10 most common words in the above list?"
COMMON_OPENING = "The top 10 words that appear most often in the list are:"
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3
CODED_INTRO = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
CODED_PROMPT = (
    "Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
CODED_OPENING = "According to the coded text above, the three most frequently appeared words are:"
FREQUENT, ALPHA, CODED_LETTERS, DOTS = 3, 2.0, 6, "...."


def vocabulary_words(tokenizer: Tokenizer) -> list[str]:
    """English words without a word list: lower-case tokens of 4 to 10 letters that begin a word."""
    texts = (tokenizer.decode([i]) for i in range(tokenizer.vocab_size))
    words = (text[1:] for text in texts if text.startswith(" "))
    return sorted({w for w in words if w.isascii() and w.isalpha() and w.islower() and 4 <= len(w) <= 10})


def coded_words(rng: random.Random, count: int) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    return list(words)


def longest_that_fits(size: int, encode: Callable[[int], list[int]], least: int) -> tuple[int, list[int]]:
    """The largest n, at least `least`, with len(encode(n)) <= size, and encode(n). Lengths grow with n.

    Raises InputError if there is none.
    """
    low, high = least, least
    best = encode(low)
    if len(best) > size:
        raise InputError(f"sizes: {size} tokens are too few, this task needs {len(best)}")
    while len(encode(2 * high)) <= size:
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if len(encode(middle)) <= size else (low, middle)
    return low, encode(low)


class CommonWords(RulerTask):
    """n numbered words: ten of them 30 times each, all others 3 times."""

    name, per_history = "cwe", 1

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        words = vocabulary_words(self.tokenizer)
        words += coded_words(rng, max(0, size // OTHER_TIMES - len(words)))  # where the vocabulary has too few
        rng.shuffle(words)
        seed = rng.getrandbits(32)

        def encode(others: int) -> list[int]:
            entries = words[:COMMON] * COMMON_TIMES + words[COMMON : COMMON + others] * OTHER_TIMES
            random.Random(seed).shuffle(entries)
            return self.encode(COMMON_INTRO + " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1)))

        others, ids = longest_that_fits(size, encode, self.candidates)
        wrong = rng.sample(words[COMMON : COMMON + others], self.candidates - 1)
        question = Question(
            prompt=COMMON_PROMPT,
            answers=tuple(words[:COMMON]),
            candidates=tuple(f" 1. {word}" for word in (words[0], *wrong)),
            evidence=(Span(0, len(ids)),),
            opening=COMMON_OPENING,
            max_new_tokens=64,
        )
        return Case(History(np.asarray(ids, np.int64)), (question,))


class FrequentWords(RulerTask):
    """Coded words whose frequencies follow a Zeta distribution; the most frequent one is dots, which do not count."""

    name, per_history = "fwe", 1

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        vocabulary = [DOTS, *coded_words(rng, max(64, size // 8))]
        shares = np.arange(1, len(vocabulary) + 1, dtype=np.float64) ** -ALPHA
        shares /= shares.sum()
        seed = rng.getrandbits(32)

        def encode(total: int) -> list[int]:
            times = np.maximum(np.round(shares * total), 0).astype(np.int64)
            entries = [word for word, n in zip(vocabulary, times.tolist(), strict=True) for _ in range(n)]
            random.Random(seed).shuffle(entries)
            return self.encode(CODED_INTRO + " ".join(entries))

        # So many words that the ranks asked for, and as many candidates behind them, all occur.
        least = int(np.ceil(1.0 / shares[FREQUENT + self.candidates]))
        _, ids = longest_that_fits(size, encode, least)
        ranked = vocabulary[1:]
        question = Question(
            prompt=CODED_PROMPT,
            answers=tuple(ranked[:FREQUENT]),
            candidates=tuple(f" {w}" for w in (ranked[0], *ranked[FREQUENT : FREQUENT + self.candidates - 1])),
            evidence=(Span(0, len(ids)),),
            opening=CODED_OPENING,
            max_new_tokens=32,
        )
        return Case(History(np.asarray(ids, np.int64)), (question,))
