"""BM25 append (RAG): the passages that match the question, put before it in their original order, plain attention."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import numpy as np
import Stemmer

from mc_runtime.model import LoadedModel, Tokenizer
from mc_runtime.retrieval import K1, OVERLAP, B, best_first
from mc_runtime.segments import SegmentedBM25

from .base import History, Opened, Progress, Question
from .plain import OpenedPlain, Told

CHUNK = 128
# Slots that an empty line between two passages takes, at most.
GAP = 4
# Of the room for text, what the conversation so far may take.
CONVERSATION_SHARE = 0.5


class ChunkIndex:
    """BM25 (k1 1.5, b 0.75) over pieces of `size` tokens of texts that come in one after another."""

    def __init__(self, tokenizer: Tokenizer, size: int = CHUNK) -> None:
        self.tokenizer, self.size = tokenizer, size
        self.spans: list[tuple[int, int]] = []
        self._index = SegmentedBM25(K1, B)
        self._stemmer = Stemmer.Stemmer("english")

    def add(self, ids: Sequence[int], at: int) -> None:
        """Index a text that stands at token `at`. Words that straddle two pieces are whole in both."""
        edges = range(0, len(ids), self.size)
        texts = [self.tokenizer.decode(ids[max(0, i - OVERLAP) : i + self.size + OVERLAP]) for i in edges]
        if texts:
            self._index.add(self._stems(texts))
        self.spans += [(at + i, at + min(i + self.size, len(ids))) for i in edges]

    def _stems(self, texts: list[str]) -> list[list[str]]:
        stems: list[list[str]] = bm25s.tokenize(
            texts, stopwords="en", stemmer=self._stemmer, return_ids=False, show_progress=False
        )
        return stems

    def best(self, query: str, room: int, follow: int = 0) -> list[tuple[int, int]]:
        """Spans of the best pieces that fit `room` tokens, in text order; pieces that match nothing are left out.

        follow: further tokens shown behind each piece. A piece that no longer fits ends the search.
        """
        stems = self._stems([query])[0]
        if not stems or not self.spans or room <= 0:
            return []
        scores = self._index.scores(stems)
        end = self.spans[-1][1]
        chosen: list[tuple[int, int]] = []
        for place in best_first(np.asarray(scores, np.float64), 1 + room // self.size):
            start, stop = self.spans[place]
            more = merged([*chosen, (start, min(stop + follow, end))])
            if sum(b - a + GAP for a, b in more) > room:
                break
            chosen = more
        return chosen


def merged(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, with those that touch or overlap made one."""
    result: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], stop))
        else:
            result.append((start, stop))
    return result


class IndexedText:
    """Keeps a `ChunkIndex` in step with what a reader was told; the conversation itself is not searched."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self.index = ChunkIndex(tokenizer, size)
        self._texts = 0

    def update(self, told: Told) -> None:
        turns = {start for start, _ in told.turns}
        for number in range(self._texts, len(told.starts)):
            start = told.starts[number]
            later = [s for s in (*told.starts[number + 1 :], *turns) if s > start]
            self.index.add(told.ids[start : min(later, default=len(told.ids))], start)
        self._texts = len(told.starts)


def conversation(told: Told, room: int) -> list[tuple[int, int]]:
    """The newest whole turns that fit `room` tokens."""
    kept: list[tuple[int, int]] = []
    for start, stop in reversed(told.turns):
        room -= stop - start + GAP
        if room < 0:
            break
        kept.insert(0, (start, stop))
    return kept


class BM25Append:
    """Passages of 128 tokens until the budget is full; when it remembers, the conversation so far follows them."""

    name, most = "BM25 append (RAG)", None

    def __init__(self, model: LoadedModel, system: Sequence[int], budget: int) -> None:
        self.model, self.system, self.budget = model, system, budget

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        text = IndexedText(self.model.tokenizer, CHUNK)

        def choose(told: Told, question: Question, room: int) -> list[tuple[int, int]]:
            text.update(told)
            said = conversation(told, int(room * CONVERSATION_SHARE))
            room -= sum(stop - start + GAP for start, stop in said)
            # The conversation stands last, where it was: texts told in between come before it.
            return [*text.index.best(question.prompt, room), *merged(said)]

        opened = OpenedPlain(self.model, self.system, history, self.budget, choose, remember)
        text.update(opened.told)
        return opened
