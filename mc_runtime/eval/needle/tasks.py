"""Needle tasks by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.lens_questions import Article

from .articles import InArticles
from .case import Task
from .counting import CommonWords, FrequentWords
from .planted import InProse, Passkey
from .ruler import NiahNeedles, NiahSingle, VariableTracking

RULER: dict[str, Callable[[Tokenizer, int, int], Task]] = {
    "niah_single_1": NiahSingle,
    "niah_multikey_2": NiahNeedles,
    "niah_multikey_3": partial(NiahNeedles, uuids=True),
    "vt": VariableTracking,
    "cwe": CommonWords,
    "fwe": FrequentWords,
}
TASKS = ("prose", "questions", "passkey", *RULER)


def make_tasks(
    names: Sequence[str],
    tokenizer: Tokenizer,
    corpora: Sequence[Corpus],
    candidates: int,
    read_limit: int,
    articles: Sequence[Article] = (),
) -> list[Task]:
    """Raises InputError for `prose` without texts, and for `questions` without articles."""
    tasks: list[Task] = []
    for name in names:
        if name == "prose":
            if not corpora:
                raise InputError("texts: the task prose needs real text to plant facts in; give at least one file")
            tasks.append(InProse(tokenizer, corpora, candidates, read_limit))
        elif name == "questions":
            if not any(article.questions for article in articles):
                raise InputError("questions: the task questions needs articles with questions; give at least one file")
            tasks.append(InArticles(tokenizer, articles, candidates, read_limit))
        elif name == "passkey":
            tasks.append(Passkey(tokenizer, candidates, read_limit))
        else:
            tasks.append(RULER[name](tokenizer, candidates, read_limit))
    return tasks
