"""Questions about a past that stands as gists: the same answer must come as from the text itself.

Gists that are trained on continuations alone draw attention to themselves: a model that has the very sentence with the
answer in front of it then answers from the gists around it. So a share of the samples asks. The answer's block and its
neighbours stand in full in most of them, and in gists in the rest; the teacher has that passage and no gists. The
replies are the model's own words where they are known (`replies`): the first token of a person's bare answer is 10 nats
away for the model, and gists would learn the form of answers before anything else.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel

from .layouts import Entry
from .lens_questions import Article, Question, TokenisedArticle

# Share of questions whose answer stands in full detail, and of the other blocks that do as well.
ANSWER_OPEN, OTHERS_OPEN = 0.75, 0.1
# Share of samples that open nothing outside the run of blocks with the answer.
DEEP = 0.5
TRIES = 200


@dataclass(frozen=True)
class QuestionBatch:
    """B histories with Q questions each.

    ids: [B, far] system prompt and text. near: [B, Q, near] what follows: the question's turn, the answer, padding.
    answer: [B, Q, 2] first place and end of the answer within `near`. blocks: [B, Q, 2] first and last block of the
    history that the answer stands in.
    """

    ids: Tensor
    near: Tensor
    answer: Tensor
    blocks: Tensor


class QuestionSource:
    """Draws questions of which an article's neighbouring paragraphs hold the answers. Raises InputError without any."""

    def __init__(self, model: LoadedModel, articles: Sequence[Article], size: int, system: str | None = None) -> None:
        self.model, self.size = model, size
        self.articles = [one for one in articles if one.questions]
        if not self.articles:
            raise InputError("questions: expected articles with questions, got none")
        self._tokens: dict[int, TokenisedArticle] = {}
        self.system = model.chat.system_ids(DEFAULT_SYSTEM_PROMPT if system is None else system)

    def draw(self, rng: random.Random, batch: int, questions: int, far: int, near: int) -> QuestionBatch:
        """A history that holds fewer questions has some of them again. Raises InputError if no article is long enough
        for `far` tokens."""
        rows = [self._history(rng, questions, far, near) for _ in range(batch)]
        ids, follow, answer, blocks = (np.stack(part) for part in zip(*rows, strict=True))
        device = self.model.decoder.device
        return QuestionBatch(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(follow).to(device),
            torch.from_numpy(answer).to(device),
            torch.from_numpy(blocks).to(device),
        )

    def _history(
        self, rng: random.Random, count: int, far: int, near: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        for _ in range(TRIES):
            span = self._tokenised(rng.randrange(len(self.articles))).span(rng, far - len(self.system))
            if span is None:
                continue
            text, found = span
            asked = []
            for question, start, stop in found:
                first, last = ((len(self.system) + at) // self.size for at in (start, stop - 1))
                turn = self._turn(question, near)
                if first > 0 and turn is not None:
                    asked.append((*turn, (first, last)))
            if asked:  # behind other gists, and beside others in full, a question is another sample
                chosen = [*rng.sample(asked, min(count, len(asked))), *rng.choices(asked, k=max(0, count - len(asked)))]
                ids = np.array([*self.system, *text], np.int64)
                return ids, *(np.array(part, np.int64) for part in zip(*chosen, strict=True))  # type: ignore[return-value]
        raise InputError(f"questions: no article of {far} tokens with an answer was found in {TRIES} tries")

    def _tokenised(self, which: int) -> TokenisedArticle:
        if which not in self._tokens:
            self._tokens[which] = TokenisedArticle(self.model.tokenizer, self.articles[which])
        return self._tokens[which]

    def _turn(self, question: Question, near: int) -> tuple[list[int], tuple[int, int]] | None:
        """`near` tokens: the question's turn and the model's own reply (the bare answer where there is none), then
        padding; None where that is too long."""
        prompt = self.model.chat.user_turn_ids(question.text)
        reply = self.model.tokenizer.encode(question.answer if question.reply is None else question.reply)
        if question.reply_ends:
            reply = [*reply, *self.model.chat.assistant_end_ids()[:1]]
        stop = len(prompt) + len(reply)
        if stop > near:
            return None
        return [*prompt, *reply, *[0] * (near - stop)], (len(prompt), stop)


def passage_alone(blocks: int, size: int, first: int, last: int) -> list[Entry]:
    """Entries of the first block, the answer's blocks and one on either side, all in full, and of nothing else."""
    shown = [0, *range(max(1, first - 1), min(blocks, last + 2))]
    return [Entry(0, i) for block in shown for i in range(block * size, (block + 1) * size)]


def open_answers(
    rng: random.Random, blocks: int, size: int, first: int, last: int, gists: Sequence[int] = (1,), level2: float = 0.0
) -> list[Entry]:
    """Entries of a past of `blocks` blocks whose first one is in full: the system prompt stands there.

    first, last: the answer's blocks. gists: per block, by level. level2: share of the complete runs of blocks, none of
    them open, that stand as gists of level 2.
    """
    opened = {block for block in range(1, blocks) if rng.random() < OTHERS_OPEN}
    if rng.random() < DEEP:  # a long memory: whole runs of blocks have nothing open
        opened = {block for block in opened if block // size == first // size}
    if rng.random() < ANSWER_OPEN:
        opened |= set(range(max(1, first - rng.randint(0, 1)), min(blocks, last + 1 + rng.randint(0, 1))))
    else:
        opened -= set(range(first, last + 1))
    entries = [Entry(0, i) for i in range(size)]
    block = 1
    while block < blocks:
        run = range(block, block + size)
        if block % size == 0 and run.stop <= blocks and opened.isdisjoint(run) and rng.random() < level2:
            entries += [Entry(2, block // size * gists[1] + g) for g in range(gists[1])]
            block = run.stop
            continue
        if block in opened:
            entries += [Entry(0, i) for i in range(block * size, (block + 1) * size)]
        else:
            entries += [Entry(1, block * gists[0] + g) for g in range(gists[0])]
        block += 1
    return entries
