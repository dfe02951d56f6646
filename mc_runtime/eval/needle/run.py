"""Ask every reader about every history."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

from ..readers import Question, Reader, Reply
from .case import Case, Task
from .scoring import generated, ranked_first

logger = logging.getLogger("mc_runtime")


@dataclass(frozen=True)
class Setting:
    """sizes: tokens of a history. n: questions per task and size. keys: questions per history, at most; histories that
    are asked are drawn with `seed`, the same for all readers."""

    sizes: tuple[int, ...]
    n: int = 100
    keys: int = 20
    seed: int = 1


@dataclass(frozen=True)
class Record:
    """One reply. depth: of the first piece of evidence. generated: share of the answers given. copied: share of the
    history that the model did not read."""

    task: str
    size: int
    reader: str
    history: int
    depth: float
    generated: float
    ranked_first: bool
    slots: int
    swaps: int
    seconds: float
    seen: float
    copied: float
    prompt: str
    answer: str
    text: str

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cases(task: Task, setting: Setting, size: int) -> Iterator[Case]:
    """Histories with `setting.n` questions in all."""
    rng = random.Random(f"{setting.seed} {task.name} {size}")
    missing = setting.n
    while missing > 0:
        most = setting.keys if task.per_history is None else min(setting.keys, task.per_history)
        case = task.make(rng, size, min(missing, most))
        missing -= len(case.questions)
        yield case


def measure(
    tasks: Sequence[Task],
    readers: Sequence[Reader],
    setting: Setting,
    ingested: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[Record]:
    """Replies as they come: task by task, size by size, history by history, reader by reader.

    ingested: called while a history is opened, with what is opened and tokens done and in all. A reader that cannot
    take a history of some size is left out there, with a line in the log.
    """
    for task in tasks:
        for size in setting.sizes:
            for number, case in enumerate(cases(task, setting, size)):
                for reader in readers:
                    length = len(case.history.ids)
                    if reader.most is not None and length > reader.most:
                        logger.info("%s: left out at %d tokens, it takes %d", reader.name, length, reader.most)
                        continue
                    for question, reply in _ask_all(reader, case, f"{task.name} {size:,}", ingested):
                        yield _record(task.name, size, reader.name, number, case, question, reply)


def _ask_all(
    reader: Reader, case: Case, what: str, ingested: Callable[[str, int, int], None]
) -> Iterator[tuple[Question, Reply]]:
    total = len(case.history.ids)
    opened = reader.open(case.history, progress=lambda done: ingested(f"{what}: {reader.name}", done, total))
    try:
        for question in case.questions:
            yield question, opened.ask(question)
    finally:
        opened.close()


def _record(task: str, size: int, reader: str, number: int, case: Case, question: Question, reply: Reply) -> Record:
    read = case.history.read
    copied = 0.0 if read is None else 1 - sum(b - a for a, b in read) / len(case.history.ids)
    return Record(
        task, size, reader, number, case.depth(question), generated(question, reply), ranked_first(question, reply),
        reply.slots, reply.swaps, reply.seconds, reply.seen, copied, question.prompt, ", ".join(question.answers),
        reply.text,
    )  # fmt: skip
