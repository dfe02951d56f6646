"""Readers without a tree: what they show is what they say they show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from reader_cases import CONFIG, FACT, WORDS, fact_question, small_history, system, text

from mc_runtime.errors import BudgetError, InputError
from mc_runtime.eval.readers import History, Question, Reader, Span
from mc_runtime.eval.readers.bm25 import BM25Append, ChunkIndex, merged
from mc_runtime.eval.readers.decoding import prompt_ids
from mc_runtime.eval.readers.infllm import BLOCK, InfLLM
from mc_runtime.eval.readers.memorizing import Memorizing
from mc_runtime.eval.readers.plain import OpenedPlain, PlainContext
from mc_runtime.eval.readers.retro import PIECE, Retro
from mc_runtime.eval.readers.window import FullContext, NoText, Recency
from mc_runtime.model import LoadedModel


@pytest.fixture
def history(model: LoadedModel) -> History:
    return small_history(model)


@pytest.fixture
def question() -> Question:
    return fact_question()


def test_plain_context_reads_only_what_differs(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    context, ids = PlainContext(model, 64), list(range(40, 90))
    whole = context.read(ids)
    runs: list[int] = []
    append = PlainContext.append
    monkeypatch.setattr(PlainContext, "append", lambda self, part: runs.append(len(part)) or append(self, part))
    torch.testing.assert_close(context.read([*ids[:30], *ids[30:]]), whole, rtol=1e-4, atol=1e-4)
    other = context.read([*ids[:30], 7, 8, 9])
    assert runs == [1, 3]
    torch.testing.assert_close(PlainContext(model, 64).read([*ids[:30], 7, 8, 9]), other, rtol=1e-4, atol=1e-4)
    with pytest.raises(BudgetError, match="65 tokens"):
        context.read(list(range(65)))


def test_bm25_pieces_fit_and_stand_in_order(model: LoadedModel) -> None:
    passages = [f"{a} {b} {c} " * 8 for a in WORDS[:4] for b in WORDS[4:8] for c in WORDS[8:]]
    ids = model.tokenizer.encode("".join(passages))
    index = ChunkIndex(model.tokenizer)
    index.add(ids, 10)
    assert index.spans[0] == (10, 138)
    assert index.spans[-1][1] == 10 + len(ids)
    for room in (100, 140, 600, 5000):
        found = index.best("lamp rain stone", room)
        assert sum(b - a for a, b in found) <= room
        assert found == sorted(found)
        assert bool(found) == (room >= 140)
    (best,) = index.best("lamp rain stone", 140)
    said = model.tokenizer.decode(ids[best[0] - 10 : best[1] - 10])
    assert "lamp" in said or "rain" in said or "stone" in said
    assert index.best("the of", 500) == []
    assert merged([(5, 9), (0, 3), (3, 5), (20, 30), (22, 25)]) == [(0, 9), (20, 30)]


def test_recency_shows_the_newest(model: LoadedModel, history: History, question: Question) -> None:
    opened = Recency(model, system(model), CONFIG.budget).open(history)
    assert isinstance(opened, OpenedPlain)
    reply = opened.ask(question)
    shown = opened.context.ids[len(system(model)) :]
    room = opened.room(question)
    assert CONFIG.budget - 64 - 32 < room + len(prompt_ids(model, question)) + 5 + len(system(model)) <= CONFIG.budget
    assert shown[:room] == history.ids[-room:].tolist()
    assert reply.slots <= CONFIG.budget
    last = replace(question, evidence=(Span(len(history.ids) - 20, len(history.ids)),))
    assert opened.ask(last).seen == 1.0


def test_full_context_refuses_what_does_not_fit(model: LoadedModel) -> None:
    reader = FullContext(model, system(model), 2000)
    assert reader.most == 2000 - 512 - len(system(model))
    with pytest.raises(InputError, match="at most"):
        reader.open(History(np.zeros(1501, np.int64)))


@pytest.mark.parametrize("kind", [BM25Append, Recency, NoText])
def test_conversations_are_remembered(
    kind: Callable[..., Reader], model: LoadedModel, history: History, question: Question
) -> None:
    opened = kind(model, system(model), CONFIG.budget).open(history, remember=True)
    assert isinstance(opened, OpenedPlain)
    opened.ask(question)
    number = opened.tell(np.asarray(model.tokenizer.encode(" Zorblat keeps 777 now. "), np.int64))
    reply = opened.ask(replace(question, evidence=(Span(0, 20, number),)))
    assert reply.slots <= CONFIG.budget
    assert reply.seen == (0.0 if kind is NoText else 1.0)
    assert len(opened.told.turns) == 2
    start, stop = opened.told.turns[0]
    said = model.tokenizer.decode(opened.told.ids[start:stop])
    assert question.prompt in said
    if kind is BM25Append:  # the conversation so far stands behind the passages
        shown = model.tokenizer.decode(opened.context.ids)
        assert shown.index(FACT.strip()) < shown.index(question.prompt) < shown.rindex(question.prompt)


def test_retro_searches_anew_every_64_tokens(
    model: LoadedModel, history: History, question: Question, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.tokenizer, "eos_ids", ())
    opened = Retro(model, system(model), 1024).open(history)
    queries: list[str] = []
    best = ChunkIndex.best
    monkeypatch.setattr(
        ChunkIndex, "best", lambda self, query, *a, **k: queries.append(query) or best(self, query, *a, **k)
    )
    monkeypatch.setattr("mc_runtime.eval.readers.plain.decode", _decode_all)
    opened.ask(replace(question, max_new_tokens=150))
    assert len(queries) == 1 + 149 // PIECE
    assert question.opening in queries[0]
    assert len(set(queries)) == 3


def _decode_all(model: LoadedModel, logits: torch.Tensor, step: Callable[[int], torch.Tensor], most: int) -> object:
    for i in range(most - 1):
        logits = step(40 + i % 50)
        assert logits.isfinite().all()
    return "", [], []


def test_infllm_with_room_for_all_reads_all(model: LoadedModel, question: Question) -> None:
    """All blocks chosen in every layer and one window over everything: plain attention."""
    ids = np.asarray(model.tokenizer.encode(text(3 * BLOCK + CONFIG.recent_tokens)), np.int64)
    config = replace(CONFIG, budget=2000, ingest_window=2048)
    question = replace(question, evidence=(Span(100, 120),))
    ours = InfLLM(model, system(model), config).open(History(ids)).ask(question)
    full = FullContext(model, system(model), 2000).open(History(ids)).ask(question)
    assert ours.seen == 1.0
    assert ours.logprobs == pytest.approx(full.logprobs, rel=1e-3)
    assert ours.text == full.text


def test_memorizing_attends_to_what_matches(model: LoadedModel, history: History, question: Question) -> None:
    """A memory changes the answer, and hooks are gone afterwards."""
    config = replace(CONFIG, budget=256)
    opened = Memorizing(model, system(model), config).open(history)
    with_memory = opened.ask(question)
    plain = Recency(model, system(model), config.budget - 32).open(history).ask(question)
    assert with_memory.logprobs != pytest.approx(plain.logprobs, abs=1e-4)
    assert plain.slots < with_memory.slots <= 256
    layer = model.decoder.layers[model.config.n_layers // 2]
    assert not layer.attention._forward_hooks
    opened.k.zero_()
    opened.v.zero_()  # the memory's values matter
    assert opened.ask(question).logprobs != pytest.approx(with_memory.logprobs, abs=1e-4)
