"""The six of RULER's thirteen tasks that need no corpus (Hsieh et al. 2024), with its default settings and templates.

    niah_single_1     a number hidden in noise                        several keys per history, asked one by one
    niah_multikey_2   the haystack is made of needles, numbers        every needle can be asked
    niah_multikey_3   the same with UUIDs as keys and values
    vt                chains of variable assignments in noise         4 hops; one chain per question
    cwe               the ten common words of a numbered list         30 times each, the others 3 times (`counting`)
    fwe               the three most frequent of coded words          Zeta with alpha 2 (`counting`)

Left out are those over essays (niah_single_2, _3, multikey_1, multivalue, multiquery) and over SQuAD and HotpotQA.
A text comes before the question, which is the user's turn; the prefix that RULER gives to an answer opens it here too.
An answer counts by the share of what was asked for that it contains.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable, Sequence

import numpy as np

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer

from ..readers import Question, Span
from ..readers.base import Tokens
from .case import Case
from .facts import WORDS
from .haystack import draw_depths, history_of, noise, plant, sentence_ends

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
INTRO = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
PROMPT = "What are all the special magic {kind} for {key} mentioned in the provided text?"
OPENING = "The special magic {kind} for {key} mentioned in the provided text are"
CHAIN_INTRO = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CHAIN_PROMPT = "Find all variables that are assigned the value {value} in the text above."
CHAIN_OPENING = (
    "According to the chain(s) of variable assignment in the text above, {count} variables are assigned the value "
    "{value}, they are:"
)
HOPS = 4
TWO_WORD_KEYS = len(WORDS) ** 2 // 2


class RulerTask:
    """What they have in common."""

    name = ""
    per_history: int | None = None

    def __init__(self, tokenizer: Tokenizer, candidates: int = 10, read_limit: int = 1 << 17) -> None:
        self.tokenizer, self.candidates, self.read_limit = tokenizer, candidates, read_limit

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def hidden_in_noise(
        self, rng: random.Random, size: int, intro: str, needles: Sequence[str]
    ) -> tuple[Tokens, list[Span]]:
        """`size` tokens: an introduction and noise with the needles at drawn depths."""
        head = np.asarray(self.encode(intro), np.int64)
        encoded = [self.encode(" " + needle) for needle in needles]
        length = size - len(head) - sum(len(ids) for ids in encoded)
        if length < 0:
            raise InputError(f"sizes: {size} tokens are too few for {len(needles)} needles")
        filler = noise(self.tokenizer, length)
        ends = sentence_ends(self.tokenizer, filler)
        ids, spans = plant(filler, ends, encoded, draw_depths(rng, len(needles)))
        return np.concatenate((head, ids)), [Span(s.start + len(head), s.stop + len(head)) for s in spans]


def niah_key(rng: random.Random, used: set[str]) -> str:
    """Two words, as RULER's keys; three once so many are in use that two would be hard to find anew."""
    while True:
        key = "-".join(rng.choice(WORDS) for _ in range(2 if len(used) < TWO_WORD_KEYS else 3))
        if key not in used:
            used.add(key)
            return key


def niah_number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def niah_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def ask_niah(kind: str, key: str, value: str, others: Sequence[str], span: Span, longest: int) -> Question:
    return Question(
        prompt=PROMPT.format(kind=kind, key=key),
        answers=(value,),
        candidates=tuple(f" {v}" for v in (value, *others)),
        evidence=(span,),
        opening=OPENING.format(kind=kind, key=key),
        max_new_tokens=longest,
    )


class NiahSingle(RulerTask):
    name, per_history = "niah_single_1", None

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        used: set[str] = set()
        pairs = [(niah_key(rng, used), niah_number(rng)) for _ in range(count)]
        needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
        ids, spans = self.hidden_in_noise(rng, size, INTRO.format(kind="numbers"), needles)
        questions = []
        for (key, value), span in zip(pairs, spans, strict=True):
            wrong = other_values(rng, [v for _, v in pairs], value, self.candidates - 1, niah_number)
            questions.append(ask_niah("numbers", key, value, wrong, span, 24))
        return Case(history_of(ids, spans, self.read_limit), tuple(questions))


def other_values(
    rng: random.Random, present: Sequence[str], value: str, count: int, draw: Callable[[random.Random], str]
) -> list[str]:
    """Wrong answers: those that stand in the text first, then drawn ones."""
    wrong = [v for v in dict.fromkeys(present) if v != value]
    rng.shuffle(wrong)
    wrong = wrong[:count]
    while len(wrong) < count:
        drawn = draw(rng)
        if drawn != value and drawn not in wrong:
            wrong.append(drawn)
    return wrong


class NiahNeedles(RulerTask):
    """The haystack is made of needles."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        candidates: int = 10,
        read_limit: int = 1 << 17,
        *,
        uuids: bool = False,
    ) -> None:
        super().__init__(tokenizer, candidates, read_limit)
        self.name, self.kind = ("niah_multikey_3", "uuids") if uuids else ("niah_multikey_2", "numbers")
        self.draw = niah_uuid if uuids else niah_number
        self.uuids = uuids

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        ids = self.encode(INTRO.format(kind=self.kind))
        used: set[str] = set()
        pairs: list[tuple[str, str]] = []
        spans: list[Span] = []
        while True:
            key, value = niah_uuid(rng) if self.uuids else niah_key(rng, used), self.draw(rng)
            needle = self.encode(" " + NEEDLE.format(kind=self.kind, key=key, value=value))
            if len(ids) + len(needle) > size:
                break
            spans.append(Span(len(ids), len(ids) + len(needle)))
            pairs.append((key, value))
            ids += needle
        if len(pairs) < max(count, 2):
            raise InputError(f"sizes: {size} tokens hold {len(pairs)} needles, too few for {count} questions")
        places = sorted(int(d * len(pairs)) for d in draw_depths(rng, count))
        questions = []
        for i in dict.fromkeys(places):
            key, value = pairs[i]
            near = [v for _, v in pairs[max(0, i - 50) : i + 50]]
            wrong = other_values(rng, near, value, self.candidates - 1, self.draw)
            questions.append(ask_niah(self.kind, key, value, wrong, spans[i], 48 if self.uuids else 24))
        asked = [q.evidence[0] for q in questions]
        return Case(history_of(np.asarray(ids, np.int64), asked, self.read_limit), tuple(questions))


class VariableTracking(RulerTask):
    name, per_history = "vt", None

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        names = invented_variables(rng, count * (HOPS + 1) + self.candidates)
        values = rng.sample(range(10_000, 100_000), count)
        unused = names[count * (HOPS + 1) :]  # where the text has too few other variables
        chains = [names[i * (HOPS + 1) : (i + 1) * (HOPS + 1)] for i in range(count)]
        needles, owner = [], []
        for number, (chain, value) in enumerate(zip(chains, values, strict=True)):
            before = str(value)
            for name in chain:
                needles.append(f"VAR {name} = {before}.")
                owner.append(number)
                before = f"VAR {name}"
        # A chain's assignments stand in their order, and chains are mixed.
        ids, spans = self._planted_in_order(rng, size, needles, owner, count)
        questions = []
        for number, (chain, value) in enumerate(zip(chains, values, strict=True)):
            elsewhere = [name for i, other in enumerate(chains) if i != number for name in other]
            wrong = other_values(rng, elsewhere, chain[-1], self.candidates - 1, lambda r: r.choice(unused))
            questions.append(
                Question(
                    prompt=CHAIN_PROMPT.format(value=value),
                    answers=tuple(chain),
                    # The last variable of the chain: the one that all hops have to be followed to.
                    candidates=tuple(f" {name}" for name in (chain[-1], *wrong)),
                    evidence=tuple(span for span, of in zip(spans, owner, strict=True) if of == number),
                    opening=CHAIN_OPENING.format(count=len(chain), value=value),
                    max_new_tokens=40,
                )
            )
        return Case(history_of(ids, sorted(spans, key=lambda s: s.start), self.read_limit), tuple(questions))

    def _planted_in_order(
        self, rng: random.Random, size: int, needles: Sequence[str], owner: Sequence[int], count: int
    ) -> tuple[Tokens, list[Span]]:
        sequence = list(owner)
        rng.shuffle(sequence)
        queues = {number: [i for i, of in enumerate(owner) if of == number] for number in range(count)}
        order = [queues[number].pop(0) for number in sequence]
        head = np.asarray(self.encode(CHAIN_INTRO), np.int64)
        encoded = [self.encode(" " + needles[i]) for i in order]
        length = size - len(head) - sum(len(ids) for ids in encoded)
        if length < 0:
            raise InputError(f"sizes: {size} tokens are too few for {len(needles)} assignments")
        filler = noise(self.tokenizer, length)
        depths = sorted(draw_depths(rng, len(order)))
        ids, spans = plant(filler, sentence_ends(self.tokenizer, filler), encoded, depths)
        placed = dict(zip(order, spans, strict=True))
        moved = [Span(placed[i].start + len(head), placed[i].stop + len(head)) for i in range(len(needles))]
        return np.concatenate((head, ids)), moved


def invented_variables(rng: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=5))] = None
    return list(names)
