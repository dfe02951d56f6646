"""Questions that people asked about articles (SQuAD, Rajpurkar et al. 2016), many articles in one history."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from mc_runtime.errors import InputError
from mc_runtime.model import Tokenizer
from mc_runtime.train.lens_questions import Article, article_tokens
from mc_runtime.train.lens_questions import Question as Asked

from ..readers import Question, Span
from .case import Case
from .haystack import history_of


class InArticles:
    """Nothing is planted: whole articles, one after another, and questions whose answers stand in them. Evidence is the
    answer alone. What is ranked beside the right answer are answers to other questions about the same article."""

    name, per_history = "questions", None

    def __init__(
        self, tokenizer: Tokenizer, articles: Sequence[Article], candidates: int = 10, read_limit: int = 1 << 17
    ) -> None:
        self.tokenizer, self.candidates, self.read_limit = tokenizer, candidates, read_limit
        self.articles = [article for article in articles if article.questions]

    def make(self, rng: random.Random, size: int, count: int) -> Case:
        order = rng.sample(self.articles, len(self.articles))
        ids: list[int] = []
        asked: list[tuple[Article, Asked, Span]] = []
        for article in order:
            text, found = article_tokens(self.tokenizer, article, room=size - len(ids))
            asked += [(article, q, Span(len(ids) + start, len(ids) + stop)) for q, start, stop in found]
            ids += text
            if len(ids) >= size:
                break
        fit = [one for one in asked if one[2].stop <= size and self._others(*one[:2])]
        if len(ids) < size or len(fit) < count:
            raise InputError(
                f"sizes: the articles give {min(len(ids), size)} tokens with {len(fit)} questions, expected {size} "
                f"tokens and {count} questions"
            )
        chosen = rng.sample(fit, count)
        questions = tuple(self._question(rng, *one) for one in chosen)
        spans = [span for _, _, span in chosen]
        return Case(history_of(np.array(ids[:size], np.int64), spans, self.read_limit), questions)

    def _others(self, article: Article, asked: Asked) -> list[str]:
        """Wrong answers; none where the article has too few that are neither part of the right one nor hold it."""
        right, others = asked.answer.lower(), dict[str, str]()
        for other in article.questions:
            wrong = other.answer.lower()
            if wrong not in right and right not in wrong:
                others.setdefault(wrong, other.answer)
        return list(others.values()) if len(others) >= self.candidates - 1 else []

    def _question(self, rng: random.Random, article: Article, asked: Asked, span: Span) -> Question:
        wrong = rng.sample(self._others(article, asked), self.candidates - 1)
        return Question(asked.text, (asked.answer,), (asked.answer, *wrong), (span,))
