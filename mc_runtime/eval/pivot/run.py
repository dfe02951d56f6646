"""Hold every conversation with every reader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mc_runtime.train.lens_questions import says

from ..needle.scoring import generated, ranked_first
from ..readers import Question, Reader, Reply
from .plan import Plan, Planner


@dataclass(frozen=True)
class Setting:
    """size: tokens of a history. n: conversations, each with one pivot, one return and one update. topics: in a
    history, and conversations over it. turns: per stretch of one topic."""

    size: int = 16_384
    n: int = 100
    topics: int = 8
    turns: int = 2
    candidates: int = 10
    seed: int = 1


@dataclass(frozen=True)
class Record:
    """One turn. stale_said, stale_ranked: the old value was given and the new one not; it was the likeliest."""

    reader: str
    history: int
    conversation: int
    turn: int
    kind: str
    generated: float
    ranked_first: bool
    stale_said: bool
    stale_ranked: bool
    slots: int
    swaps: int
    seconds: float
    seen: float
    refocus: int | None
    prompt: str
    answer: str
    text: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def plans(planner: Planner, setting: Setting) -> Iterator[Plan]:
    """Histories with `setting.n` conversations in all."""
    rng, missing = random.Random(f"{setting.seed} pivot {setting.size}"), setting.n
    while missing > 0:
        plan = planner.make(rng, setting.size, missing)
        missing -= len(plan.conversations)
        yield plan


def measure(
    planner: Planner,
    readers: Sequence[Reader],
    setting: Setting,
    ingested: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Record]:
    """Turns as they come: history by history, reader by reader, conversation by conversation. ingested: called while
    a history is opened, with what is opened and tokens done and in all."""
    for number, plan in enumerate(plans(planner, setting)):
        total = len(plan.history.ids)
        for reader in readers:

            def progress(done: int, name: str = reader.name, total: int = total) -> None:
                ingested(name, done, total)

            for c, turns in enumerate(plan.conversations):
                opened = reader.open(plan.history, remember=True, progress=progress)
                try:
                    for t, turn in enumerate(turns):
                        if turn.before is not None:
                            opened.tell(np.asarray(turn.before, np.int64))
                        reply = opened.ask(turn.question)
                        yield _record(reader.name, number, c, t, turn.kind, turn.question, reply)
                finally:
                    opened.close()


def _record(
    reader: str, history: int, conversation: int, t: int, kind: str, question: Question, reply: Reply
) -> Record:
    right = generated(question, reply)
    stale_said = stale_ranked = False
    if question.stale is not None:
        stale_said = right == 0 and says(reply.text, question.candidates[question.stale].strip())
        stale_ranked = int(np.argmax(reply.logprobs)) == question.stale
    return Record(
        reader, history, conversation, t, kind, right, ranked_first(question, reply), stale_said, stale_ranked,
        reply.slots, reply.swaps, reply.seconds, reply.seen, reply.refocus, question.prompt,
        ", ".join(question.answers), reply.text,
    )  # fmt: skip
