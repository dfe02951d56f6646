"""A history of several topics, and the conversations held over it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer
from mc_runtime.train.corpus import Corpus

from ..needle.haystack import plant, prose, sentence_ends
from ..readers import History, Question, Span
from .topics import FACTS, Topic, TopicFact, draw_new, draw_topics

FACTS_PER_PARAGRAPH = 2


@dataclass(frozen=True)
class Turn:
    """kind: `first` (of the conversation), `stay` (same topic as before), `pivot` (first turn on another topic),
    `return` (first turn back on an earlier one), `updated` (asks for what has changed since it was first asked).
    before: a text that comes in before the question, as token ids; or None."""

    kind: str
    question: Question
    before: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """conversations: each starts from the history alone."""

    history: History
    conversations: tuple[tuple[Turn, ...], ...]


class Planner:
    """turns: per stretch of one topic, 2 to FACTS - 1. candidates: values that are ranked. longest: tokens of an
    answer."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        corpora: Sequence[Corpus],
        *,
        topics: int,
        turns: int,
        candidates: int,
        longest: int = 24,
    ) -> None:
        if not 2 <= turns < FACTS:
            raise InputError(f"turns: expected 2 to {FACTS - 1}, got {turns}")
        if topics < 2:
            raise InputError(f"topics: expected at least 2, got {topics}")
        self.tokenizer, self.corpora = tokenizer, corpora
        self.topics, self.turns, self.candidates, self.longest = topics, turns, candidates, longest

    def make(self, rng: random.Random, size: int, count: int) -> Plan:
        """A history of `size` tokens and up to `count` conversations, each from one topic to the next and back.

        Raises InputError if the topics do not fit.
        """
        topics = draw_topics(rng, self.topics)
        history, places = self._write(rng, size, topics)
        conversations = []
        for i in range(min(count, len(topics))):
            a, b = i, (i + 1) % len(topics)
            conversations.append(self._converse(rng, topics, places, a, b))
        return Plan(history, tuple(conversations))

    def _write(self, rng: random.Random, size: int, topics: Sequence[Topic]) -> tuple[History, dict[int, Span]]:
        """Paragraphs in the order of topics, spread evenly over prose; and where each fact (by id) is stated."""
        paragraphs: list[list[int]] = []
        inside: list[tuple[int, int, int, int]] = []  # paragraph, start, stop, fact
        for topic in topics:
            for i in range(0, len(topic.facts), FACTS_PER_PARAGRAPH):
                opening = rng.choice(topic.domain.introductions).format(topic=topic.name)
                ids = self.tokenizer.encode("\n\n" + opening[0].upper() + opening[1:])
                for fact in topic.facts[i : i + FACTS_PER_PARAGRAPH]:
                    said = self.tokenizer.encode(" " + fact.statement[0].upper() + fact.statement[1:])
                    inside.append((len(paragraphs), len(ids), len(ids) + len(said), id(fact)))
                    ids = ids + said
                paragraphs.append(ids + self.tokenizer.encode("\n\n"))
        length = size - sum(len(p) for p in paragraphs)
        if length < size // 2:
            raise InputError(f"size: {size} tokens are too few for {len(topics)} topics of {size - length} tokens")
        filler = prose(self.corpora, rng, length)
        depths = [(i + rng.random()) / len(paragraphs) for i in range(len(paragraphs))]
        whole, spans = plant(filler, sentence_ends(self.tokenizer, filler), paragraphs, depths)
        places = {fact: Span(spans[p].start + a, spans[p].start + b) for p, a, b, fact in inside}
        return History(whole), places

    def _converse(
        self, rng: random.Random, topics: Sequence[Topic], places: dict[int, Span], a: int, b: int
    ) -> tuple[Turn, ...]:
        """`turns` on a; `turns` on b, after the first of which the fact that was asked first changes; `turns` on a."""
        k, topic, other = self.turns, topics[a], topics[b]
        first, away = rng.sample(topic.facts, len(topic.facts)), rng.sample(other.facts, len(other.facts))

        def ask(of: Topic, fact: TopicFact) -> Question:
            return self._question(rng, topics, of, fact, fact.value, places[id(fact)])

        turns = [Turn("first" if i == 0 else "stay", ask(topic, first[i])) for i in range(k)]
        turns += [Turn("pivot" if i == 0 else "stay", ask(other, away[i])) for i in range(k)]
        changed = first[0]
        value = draw_new(rng, changed.attribute.draw, {changed.value})
        text = rng.choice(changed.attribute.updates).format(topic=topic.name, value=value)
        update = tuple(self.tokenizer.encode("\n\n" + text[0].upper() + text[1:] + "\n\n"))
        turns[k + 1] = Turn("stay", turns[k + 1].question, update)
        turns.append(Turn("return", ask(topic, first[k])))
        about = self._question(rng, topics, topic, changed, value, Span(0, len(update), 1), changed.value)
        turns.append(Turn("updated", about))
        turns += [Turn("stay", ask(topic, first[i])) for i in range(1, k - 1)]
        return tuple(turns)

    def _question(
        self,
        rng: random.Random,
        topics: Sequence[Topic],
        topic: Topic,
        fact: TopicFact,
        value: str,
        evidence: Span,
        stale: str | None = None,
    ) -> Question:
        """Candidates: the value, the old one if there is one, values of the same sort (years, names, ...) that stand
        in the history, drawn ones."""
        attribute = fact.attribute
        known = [value] if stale is None else [value, stale]
        others = [
            f.value for t in topics for f in t.facts if f.attribute.draw is attribute.draw and f.value not in known
        ]
        rng.shuffle(others)
        known = list(dict.fromkeys([*known, *others]))[: self.candidates]
        used = set(known)
        while len(known) < self.candidates:
            known.append(draw_new(rng, attribute.draw, used))
        return Question(
            prompt=attribute.prompt.format(topic=topic.name),
            answers=(value,),
            candidates=tuple(f" {v}" for v in known),
            evidence=(evidence,),
            opening=attribute.opening.format(topic=topic.name),
            max_new_tokens=self.longest,
            stale=None if stale is None else 1,
        )
