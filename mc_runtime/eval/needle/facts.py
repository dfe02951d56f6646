"""Facts that no model can know: invented people and things, random numbers and words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..readers import Question, Span

_ONSETS = ("b", "br", "c", "d", "dr", "f", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo")
_CODAS = ("", "l", "n", "r", "s", "th", "ck", "nd", "m", "rt")
WORDS = (
    "anchor", "apple", "arrow", "barrel", "basket", "beacon", "blanket", "bottle", "bridge", "bucket", "butter",
    "button", "cabin", "candle", "canvas", "carpet", "castle", "cherry", "copper", "cotton", "dagger", "desert",
    "donkey", "dragon", "engine", "falcon", "feather", "forest", "garden", "garlic", "ginger", "hammer", "harbor",
    "helmet", "island", "jacket", "kettle", "ladder", "lantern", "lemon", "magnet", "marble", "meadow", "mirror",
    "mountain", "needle", "onion", "orange", "paper", "pebble", "pepper", "pillow", "pocket", "rabbit", "ribbon",
    "river", "saddle", "salmon", "shadow", "silver", "spider", "temple", "tiger", "tunnel", "turtle", "velvet",
    "violin", "wagon", "walnut", "window",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey", "purple", "pink", "silver", "golden")
THINGS = (
    "door", "box", "gate", "chest", "cabinet", "drawer", "safe", "locker", "cellar", "tower", "shed", "barn", "boat",
    "trunk", "archive", "vault",
)  # fmt: skip


def invented_names(rng: random.Random, count: int) -> list[str]:
    """Distinct given and family names; no two share either."""
    seen: set[str] = set()

    def one(syllables: int) -> str:
        while True:
            parts = (rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
            name = "".join(parts).capitalize()
            if len(name) >= 4 and name not in seen:
                seen.add(name)
                return name

    return [f"{one(1 + rng.randrange(2))} {one(2)}" for _ in range(count)]


@dataclass(frozen=True)
class Kind:
    """A sort of fact. statements: ways to say it, with {key} and {value}; the other two are what is asked and how the
    answer begins."""

    name: str
    statements: tuple[str, ...]
    prompt: str
    opening: str
    words: bool


PASSKEY = Kind(
    "passkey",
    ("The pass key for the {key} is {value}. Remember it. {value} is the pass key for the {key}.",),
    "What is the pass key for the {key}?",
    "The pass key for the {key} is",
    words=False,
)
PROSE_KINDS = (
    Kind(
        "locker number",
        (
            "It should be said that the number of the locker of {key} is {value}.",
            "The locker that belongs to {key} has the number {value}.",
            "{key} keeps everything in locker number {value}.",
        ),
        "What is the number of the locker of {key}?",
        "The number of the locker of {key} is",
        words=False,
    ),
    Kind(
        "password",
        (
            'It was agreed that the password of {key} would be "{value}".',
            'The password that {key} chose is "{value}".',
            'For the gate, {key} has to say the password "{value}".',
        ),
        "What is the password of {key}?",
        'The password of {key} is "',
        words=True,
    ),
    Kind(
        "debt",
        (
            "In the ledger it is written that {key} owes {value} crowns.",
            "The debt of {key} amounts to {value} crowns.",
            "{key} has never paid back the {value} crowns of that debt.",
        ),
        "How many crowns does {key} owe?",
        "The number of crowns that {key} owes is",
        words=False,
    ),
)


@dataclass(frozen=True)
class Fact:
    kind: Kind
    key: str
    value: str
    statement: str


def draw_value(rng: random.Random, kind: Kind) -> str:
    return rng.choice(WORDS) if kind.words else str(rng.randrange(10_000, 100_000))


def draw_facts(rng: random.Random, kinds: Sequence[Kind], keys: Sequence[str]) -> list[Fact]:
    """One fact for each key, kinds in turn; values of one kind differ as long as there are enough."""
    facts, used = [], set[str]()
    for i, key in enumerate(keys):
        kind = kinds[i % len(kinds)]
        value = draw_value(rng, kind)
        for _ in range(1000):
            if value not in used:
                break
            value = draw_value(rng, kind)
        used.add(value)
        facts.append(Fact(kind, key, value, rng.choice(kind.statements).format(key=key, value=value)))
    return facts


def ask_fact(rng: random.Random, fact: Fact, others: Sequence[Fact], evidence: Span, candidates: int) -> Question:
    """Candidates: the value, values of other facts of the same kind that stand in the same text, then drawn ones."""
    kind = fact.kind
    values = list(dict.fromkeys(o.value for o in others if o.kind is kind and o.value != fact.value))
    rng.shuffle(values)
    values = values[: candidates - 1]
    while len(values) < candidates - 1:
        value = draw_value(rng, kind)
        if value != fact.value and value not in values:
            values.append(value)
    space = "" if kind.opening.endswith('"') else " "
    return Question(
        prompt=kind.prompt.format(key=fact.key),
        answers=(fact.value,),
        candidates=tuple(space + value for value in (fact.value, *values)),
        evidence=(evidence,),
        opening=kind.opening.format(key=fact.key),
    )
