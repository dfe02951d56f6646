"""Scenes in which a question decides what is relevant: SQuAD's articles as a history, an answer as what follows.

Rajpurkar et al. 2016, the file format of its releases 1.1 (`data`, `paragraphs`, `qas`, `answers`).
"""

from __future__ import annotations

import json
import lzma
import random
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel, Tokenizer


@dataclass(frozen=True)
class Question:
    """paragraph: its place among the article's; answer_start: characters into it. reply: how the base model itself
    gives the answer (see `replies`), where that is known; reply_ends: it ends there, else it was cut."""

    paragraph: int
    text: str
    answer: str
    answer_start: int
    reply: str | None = None
    reply_ends: bool = True


@dataclass(frozen=True)
class Article:
    title: str
    paragraphs: tuple[str, ...]
    questions: tuple[Question, ...]


def read_articles(path: Path) -> list[Article]:
    """Articles of a `.json` or `.json.xz` file in SQuAD's format. Raises InputError if it is not one."""
    try:
        raw = path.read_bytes()
        data = json.loads(lzma.decompress(raw) if path.suffix == ".xz" else raw)["data"]
        return [_article(one) for one in data]
    except (OSError, lzma.LZMAError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not a readable file of questions in SQuAD's format ({error})") from error


def _article(data: dict[str, object]) -> Article:
    paragraphs: list[dict[str, object]] = data["paragraphs"]  # type: ignore[assignment]
    questions = [
        Question(
            i,
            str(q["question"]).strip(),
            str(q["answers"][0]["text"]),
            int(q["answers"][0]["answer_start"]),
            q["answers"][0].get("reply"),
            bool(q["answers"][0].get("reply_ends", True)),
        )
        for i, paragraph in enumerate(paragraphs)
        for q in paragraph["qas"]  # type: ignore[attr-defined]
        if q["answers"]
    ]
    return Article(str(data["title"]), tuple(str(p["context"]) for p in paragraphs), tuple(questions))


def says(text: str, answer: str) -> bool:
    """Whether a text contains an answer as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Asked:
    """ids: [far + recent + targets]: system prompt, text, and the question's turn, which ends at far + recent; then the
    answer and padding. known: answer tokens. answer_block: the block of the history that holds the answer's start."""

    ids: NDArray[np.int64]
    known: int
    answer_block: int
    question: str


def draw_question(
    rng: random.Random, model: LoadedModel, articles: list[Article], far: int, recent: int, targets: int, size: int
) -> Asked:
    """A question whose answer stands in the far part, but not in its first block, which always stays in full."""
    system = model.chat.system_ids(DEFAULT_SYSTEM_PROMPT)
    for _ in range(1000):
        article = rng.choice(articles)
        if not article.questions:
            continue
        question = rng.choice(article.questions)
        prompt = model.chat.user_turn_ids(question.text)
        answer = [*model.tokenizer.encode(question.answer), *model.chat.assistant_end_ids()[:1]]
        if len(prompt) > recent or len(answer) > targets:
            continue
        room = far + recent - len(prompt) - len(system)
        placed = _history(rng, model, article, question, room)
        if placed is None:
            continue
        text, at = placed
        block = (len(system) + at) // size
        if not 0 < block < far // size:
            continue
        ids = np.zeros(far + recent + targets, np.int64)
        ids[: far + recent] = [*system, *text, *prompt]
        ids[far + recent : far + recent + len(answer)] = answer
        return Asked(ids, len(answer), block, question.text)
    raise InputError(f"questions: none of 1,000 drawn ones fits {far} tokens of history and {recent} of a question")


def draw_questions(
    rng: random.Random,
    model: LoadedModel,
    articles: list[Article],
    far: int,
    recent: int,
    targets: int,
    size: int,
    most: int,
) -> list[Asked]:
    """One to `most` questions about one text, which is read once for all of them: their far tokens are the same. What
    is relevant in a text then depends on the question alone. Raises InputError if no text has any."""
    system = model.chat.system_ids(DEFAULT_SYSTEM_PROMPT)
    end = model.chat.assistant_end_ids()[:1]
    for _ in range(1000):
        span = article_span(model.tokenizer, rng.choice(articles), rng, far + recent - len(system))
        if span is None:
            continue
        text, found = [*system, *span[0]], span[1]
        rng.shuffle(found)
        drawn: list[Asked] = []
        for question, start, _ in found:
            block = (len(system) + start) // size
            prompt = model.chat.user_turn_ids(question.text)
            answer = [*model.tokenizer.encode(question.answer), *end]
            if len(prompt) > recent or len(answer) > targets or not 0 < block < far // size:
                continue
            ids = np.zeros(far + recent + targets, np.int64)
            ids[: far + recent] = [*text[: far + recent - len(prompt)], *prompt]
            ids[far + recent : far + recent + len(answer)] = answer
            drawn.append(Asked(ids, len(answer), block, question.text))
            if len(drawn) == most:
                break
        if drawn:
            return drawn
    raise InputError(
        f"questions: no question of 1,000 drawn texts fits {far} tokens of history and {recent} of its own"
    )


def _history(
    rng: random.Random, model: LoadedModel, article: Article, question: Question, room: int
) -> tuple[list[int], int] | None:
    """`room` tokens of an article's neighbouring paragraphs, the question's among them, and where its answer starts."""
    encode = model.tokenizer.encode
    paragraph = article.paragraphs[question.paragraph]
    before = encode(paragraph[: question.answer_start])
    own = [*before, *encode(paragraph[question.answer_start :] + "\n\n")]
    left: list[int] = []
    right: list[int] = []
    wanted = rng.randrange(max(1, room - len(own)))  # tokens in front of the paragraph
    i = question.paragraph - 1
    while i >= 0 and len(left) < wanted:
        left = [*encode(article.paragraphs[i] + "\n\n"), *left]
        i -= 1
    i = question.paragraph + 1
    while i < len(article.paragraphs) and len(own) + len(right) < room:
        right += encode(article.paragraphs[i] + "\n\n")
        i += 1
    left = left[-wanted:] if wanted else []
    text = [*left, *own, *right]
    if len(text) < room:
        return None
    return text[:room], len(left) + len(before)


def article_tokens(
    tokenizer: Tokenizer, article: Article, first: int = 0, room: int | None = None
) -> tuple[list[int], list[tuple[Question, int, int]]]:
    """An article's paragraphs from number `first` on, until they are `room` tokens or more, and the questions that they
    answer, each with the answer's first token and end."""
    text: list[int] = []
    found: list[tuple[Question, int, int]] = []
    for number in range(first, len(article.paragraphs)):
        paragraph = article.paragraphs[number]
        for question in article.questions:
            if question.paragraph == number:
                start = len(tokenizer.encode(paragraph[: question.answer_start]))
                stop = len(tokenizer.encode(paragraph[: question.answer_start + len(question.answer)]))
                found.append((question, len(text) + start, len(text) + max(stop, start + 1)))
        text += tokenizer.encode(paragraph + "\n\n")
        if room is not None and len(text) >= room:
            break
    return text, found


def article_span(
    tokenizer: Tokenizer, article: Article, rng: random.Random, room: int
) -> tuple[list[int], list[tuple[Question, int, int]]] | None:
    """`room` tokens of an article from a drawn paragraph on, and the questions that they answer, as `article_tokens`
    gives them. None where the article is too short from there on."""
    text, found = article_tokens(tokenizer, article, rng.randrange(len(article.paragraphs)), room)
    return None if len(text) < room else (text[:room], [one for one in found if one[2] <= room])


class TokenisedArticle:
    """An article tokenised once, for many spans of it. text: its tokens; starts: the first of each paragraph; found:
    its questions, each with the answer's first token and end."""

    def __init__(self, tokenizer: Tokenizer, article: Article) -> None:
        self.text, self.found = article_tokens(tokenizer, article)
        lengths = [len(tokenizer.encode(paragraph + "\n\n")) for paragraph in article.paragraphs]
        self.starts = [0, *accumulate(lengths)][:-1]

    def span(self, rng: random.Random, room: int) -> tuple[list[int], list[tuple[Question, int, int]]] | None:
        """As `article_span`."""
        begin = self.starts[rng.randrange(len(self.starts))]
        text = self.text[begin : begin + room]
        if len(text) < room:
            return None
        inside = [(q, start - begin, stop - begin) for q, start, stop in self.found if begin <= start]
        return text, [one for one in inside if one[2] <= room]
