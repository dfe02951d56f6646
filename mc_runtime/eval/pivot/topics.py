"""Invented topics: places, ships, schools and inns, each with facts told in paragraphs of varied wording."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from ..needle.facts import COLOURS, WORDS, invented_names

Draw = Callable[[random.Random], str]


def _name(rng: random.Random) -> str:
    return invented_names(rng, 1)[0]


def _year(rng: random.Random) -> str:
    return str(rng.randrange(1510, 1960))


def _count(rng: random.Random) -> str:
    return str(rng.randrange(110, 990))


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _colour(rng: random.Random) -> str:
    return rng.choice(COLOURS)


@dataclass(frozen=True)
class Attribute:
    """statements, updates: ways to say it first and to say that it has changed, with {topic} and {value}."""

    draw: Draw
    statements: tuple[str, ...]
    updates: tuple[str, ...]
    prompt: str
    opening: str


def _attribute(draw: Draw, noun: str, *statements: str, prompt: str = "", opening: str = "") -> Attribute:
    """noun: as in "the mayor"; what is not given is made of it."""
    updates = (
        f"A notice that came today says that {noun} of {{topic}} is now {{value}}.",
        f"News from {{topic}}: from this week on, {noun} is {{value}}.",
    )
    return Attribute(
        draw,
        (f"{noun[0].upper()}{noun[1:]} of {{topic}} is {{value}}.", *statements),
        updates,
        prompt or f"What is {noun} of {{topic}}?",
        opening or f"{noun[0].upper()}{noun[1:]} of {{topic}} is",
    )


@dataclass(frozen=True)
class Domain:
    """name: form of a topic's name, with {name}. introductions: sentences that open its paragraphs."""

    name: str
    introductions: tuple[str, ...]
    attributes: tuple[Attribute, ...]


DOMAINS = (
    Domain(
        "the town of {name}",
        (
            "Travellers often speak of {topic}.",
            "There is more to be told about {topic}.",
            "Those who pass through {topic} remember it well.",
        ),
        (
            _attribute(
                _name,
                "the mayor",
                "The people of {topic} chose {value} as their mayor.",
                prompt="Who is the mayor of {topic}?",
            ),
            _attribute(_year, "the founding year", "As the founding year of {topic} the records give {value}."),
            _attribute(_count, "the number of houses", "{topic} is known to have a number of {value} houses."),
            _attribute(_word, "the emblem", "On every door in {topic} one sees its emblem, the {value}."),
            _attribute(_colour, "the colour of the flag", "The flag of {topic} has the colour {value}."),
        ),
    ),
    Domain(
        "the ship {name}",
        (
            "In the harbour they talk of {topic}.",
            "Sailors have much to say about {topic}.",
            "Of {topic} one more thing is known.",
        ),
        (
            _attribute(
                _name,
                "the captain",
                "On board of {topic} all orders come from the captain, {value}.",
                prompt="Who is the captain of {topic}?",
            ),
            _attribute(_year, "the launching year", "The launching year of {topic} was {value}."),
            _attribute(_count, "the number of sailors", "To sail {topic}, a number of {value} sailors is needed."),
            _attribute(_word, "the figurehead", "At the bow of {topic} stands the figurehead, a {value}."),
            _attribute(_colour, "the colour of the hull", "The hull of {topic} was given the colour {value}."),
        ),
    ),
    Domain(
        "the school at {name}",
        (
            "Many letters mention {topic}.",
            "The inspectors wrote about {topic} again.",
            "Parents like to hear about {topic}.",
        ),
        (
            _attribute(
                _name,
                "the headmaster",
                "The pupils of {topic} obey their headmaster, {value}.",
                prompt="Who is the headmaster of {topic}?",
            ),
            _attribute(_year, "the opening year", "The doors of {topic} were first open in the year {value}."),
            _attribute(_count, "the number of pupils", "The register of {topic} shows a number of {value} pupils."),
            _attribute(_word, "the mascot", "At every game of {topic} one sees the mascot, a {value}."),
            _attribute(_colour, "the colour of the uniform", "The uniform of {topic} has the colour {value}."),
        ),
    ),
    Domain(
        "the inn of {name}",
        (
            "A night at {topic} is not soon forgotten.",
            "Coachmen know {topic}.",
            "Guests have written about {topic}.",
        ),
        (
            _attribute(
                _name,
                "the keeper",
                "Whoever comes to {topic} is greeted by the keeper, {value}.",
                prompt="Who is the keeper of {topic}?",
            ),
            _attribute(_year, "the building year", "The building year of {topic}, cut in stone, is {value}."),
            _attribute(_count, "the number of the road", "The road that leads to {topic} has the number {value}."),
            _attribute(_word, "the sign", "Over the entrance of {topic} hangs its sign, a {value}."),
            _attribute(_colour, "the colour of the roof", "The roof of {topic} has the colour {value}."),
        ),
    ),
)


@dataclass(frozen=True)
class TopicFact:
    """number: of the attribute in its domain."""

    attribute: Attribute
    value: str
    statement: str


@dataclass(frozen=True)
class Topic:
    """name: as in "the ship Tarvel". facts: in the order told."""

    name: str
    domain: Domain
    facts: tuple[TopicFact, ...]


FACTS = min(len(domain.attributes) for domain in DOMAINS)


def draw_topics(rng: random.Random, count: int) -> list[Topic]:
    """Domains in turn; no two topics share a name, nor two facts of one attribute a value while there are enough."""
    names = [name.split()[1] for name in invented_names(rng, count)]
    used: dict[int, set[str]] = {}
    topics = []
    for i, name in enumerate(names):
        domain = DOMAINS[i % len(DOMAINS)]
        topic = domain.name.format(name=name)
        facts = []
        for attribute in rng.sample(domain.attributes, FACTS):
            value = draw_new(rng, attribute.draw, used.setdefault(id(attribute), set()))
            statement = rng.choice(attribute.statements).format(topic=topic, value=value)
            facts.append(TopicFact(attribute, value, statement))
        topics.append(Topic(topic, domain, tuple(facts)))
    return topics


def draw_new(rng: random.Random, draw: Draw, used: set[str]) -> str:
    """A value that is not in `used`, to which it is added; after many tries any."""
    value = draw(rng)
    for _ in range(1000):
        if value not in used:
            break
        value = draw(rng)
    used.add(value)
    return value
