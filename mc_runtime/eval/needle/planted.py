"""Facts in filler and in real prose."""

from __future__ import annotations

import random
from collections.abc import Sequence

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer
from mc_runtime.train.corpus import Corpus

from ..readers.base import Tokens
from .case import Case
from .facts import COLOURS, PASSKEY, PROSE_KINDS, THINGS, Kind, ask_fact, draw_facts, invented_names
from .haystack import draw_depths, history_of, noise, plant, prose, sentence_ends


class Passkey:
    """Pass keys of coloured things in low-entropy filler (Mohtashami & Jaggi 2023); several per history, so that one
    reading serves several questions, and every other key is a distractor."""

    name, per_history = "passkey", len(COLOURS) * len(THINGS)

    def __init__(self, tokenizer: Tokenizer, candidates: int = 10, read_limit: int = 1 << 17) -> None:
        self.tokenizer, self.candidates, self.read_limit = tokenizer, candidates, read_limit

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        keys = rng.sample([f"{colour} {thing}" for colour in COLOURS for thing in THINGS], count)
        return make_planted(self.tokenizer, rng, size, (PASSKEY,), keys, None, self.candidates, self.read_limit)


class InProse:
    """Facts about invented people, stated in varied words between the sentences of real texts."""

    name, per_history = "prose", None

    def __init__(
        self, tokenizer: Tokenizer, corpora: Sequence[Corpus], candidates: int = 10, read_limit: int = 1 << 17
    ) -> None:
        self.tokenizer, self.corpora, self.candidates, self.read_limit = tokenizer, corpora, candidates, read_limit

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        keys = invented_names(rng, count)
        return make_planted(
            self.tokenizer, rng, size, PROSE_KINDS, keys, self.corpora, self.candidates, self.read_limit
        )


def make_planted(
    tokenizer: Tokenizer,
    rng: random.Random,
    size: int,
    kinds: Sequence[Kind],
    keys: Sequence[str],
    corpora: Sequence[Corpus] | None,
    candidates: int,
    read_limit: int,
) -> Case:
    """A history of exactly `size` tokens with one fact for each key, in prose of `corpora`, or in noise without."""
    facts = draw_facts(rng, kinds, keys)
    needles = [tokenizer.encode(" " + fact.statement) for fact in facts]
    length = size - sum(len(needle) for needle in needles)
    if length < size // 2:
        raise InputError(f"sizes: {size} tokens are too few for {len(facts)} facts of {size - length} tokens in all")
    filler: Tokens = noise(tokenizer, length) if corpora is None else prose(corpora, rng, length)
    ids, spans = plant(filler, sentence_ends(tokenizer, filler), needles, draw_depths(rng, len(facts)))
    questions = [ask_fact(rng, fact, facts, span, candidates) for fact, span in zip(facts, spans, strict=True)]
    return Case(history_of(ids, spans, read_limit), tuple(questions))
