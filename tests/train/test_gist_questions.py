"""Questions in the training of gists."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from mc_kernels import GistPoolWeights
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_options import GistTaskOptions
from mc_runtime.train.gist_questions import QuestionSource, open_answers, passage_alone
from mc_runtime.train.gist_task import GistTask
from mc_runtime.train.layouts import LayoutOptions
from mc_runtime.train.lens_questions import Article, Question
from mc_runtime.train.pooled_maker import PooledMaker

K, FAR, NEAR = 8, 320, 64
OPTIONS = GistTaskOptions(
    lengths=(64,), length_weights=(1.0,), cuts=(1,), near=32, tokens=512, questions=1.0, question_lengths=(FAR,),
    question_near=NEAR, asked=2, layout=LayoutOptions(true_positions=0.0),
)  # fmt: skip


@pytest.fixture
def source(articles: list[Article], model: LoadedModel) -> QuestionSource:
    return QuestionSource(model, articles, K)


def test_answers_are_where_they_are_said_to_be(source: QuestionSource, model: LoadedModel) -> None:
    drawn = source.draw(random.Random(0), 3, 2, FAR, NEAR)
    assert drawn.ids.shape == (3, FAR)
    assert drawn.near.shape == (3, 2, NEAR)
    for row in range(3):
        for q in range(2):
            start, stop = drawn.answer[row, q].tolist()
            near = drawn.near[row, q]
            answer = model.tokenizer.decode(near[start:stop].tolist()).removesuffix("<|im_end|>")
            assert answer.endswith("th")
            assert model.tokenizer.decode(near[:start].tolist()).rstrip().endswith("assistant")
            assert not near[stop:].any()
            first, last = drawn.blocks[row, q].tolist()
            assert 0 < first <= last < FAR // K
            assert answer in model.tokenizer.decode(drawn.ids[row, first * K : (last + 1) * K].tolist())


def test_layouts_open_the_answer_in_most_cases() -> None:
    rng, shown = random.Random(0), 0
    for _ in range(200):
        entries = open_answers(rng, 20, K, 7, 8)
        tokens = {e.index // K for e in entries if e.level == 0}
        assert 0 in tokens
        assert sum(1 if e.level else 1 / K for e in entries) == 20, "the past is tiled"
        assert {7, 8} <= tokens or not {7, 8} & tokens
        shown += {7, 8} <= tokens
    assert 120 < shown < 180


def pools(model: LoadedModel) -> list[GistPoolWeights]:
    c = model.config
    return [GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)]


def test_loss_is_that_of_the_answers_and_teaches(
    source: QuestionSource, model: LoadedModel, corpus: Callable[[str], Corpus]
) -> None:
    task = GistTask(model.decoder, [corpus("a")], pools(model), OPTIONS, questions=source)
    loss, figures = task.loss(random.Random(1))
    assert set(figures) == {"loss", "answer_nll"}
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in task.parameters.values())
    assert any(float(p.grad.abs().max()) > 0 for p in task.parameters.values() if p.grad is not None)


def test_with_the_passage_alone_the_student_is_the_teacher(
    source: QuestionSource, model: LoadedModel, corpus: Callable[[str], Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mc_runtime.train.gist_task.open_answers",
        lambda rng, blocks, size, first, last, *_: passage_alone(blocks, size, first, last),
    )
    options = GistTaskOptions(**{**OPTIONS.__dict__, "teacher": 1.0})
    task = GistTask(model.decoder, [corpus("a")], pools(model), options, questions=source)
    loss, _ = task.loss(random.Random(1))
    np.testing.assert_allclose(loss.item(), 0.0, atol=1e-5)


def test_what_the_teacher_reads() -> None:
    shown = [e.index // K for e in passage_alone(20, K, 7, 8)]
    assert shown == sorted([0, 6, 7, 8, 9] * K)
    assert {e.index // K for e in passage_alone(20, K, 1, 19)} == set(range(20))
    assert {e.index // K for e in passage_alone(20, K, 1, 1)} == {0, 1, 2}


def test_the_models_own_reply_is_what_follows(source: QuestionSource, model: LoadedModel) -> None:
    """In place of the answer, with an end only where the model ended it."""
    plain = Question(0, "Which 1?", "4th", 9)
    for question, said in (
        (plain, "4th<|im_end|>"),
        (replace(plain, reply="It is the 4th lamp."), "It is the 4th lamp.<|im_end|>"),
        (replace(plain, reply="It is the 4th", reply_ends=False), "It is the 4th"),
    ):
        turn = source._turn(question, NEAR)
        assert turn is not None
        ids, (start, stop) = turn
        assert model.tokenizer.decode(ids[start:stop]) == said.removesuffix("<|im_end|>")
        assert (ids[stop - 1] == model.chat.assistant_end_ids()[0]) == said.endswith("<|im_end|>")
        assert len(ids) == NEAR
        assert source._turn(question, stop) is not None
        assert source._turn(question, stop - 1) is None


def test_a_share_of_the_micro_batches_asks(
    source: QuestionSource, model: LoadedModel, corpus: Callable[[str], Corpus]
) -> None:
    options = GistTaskOptions(**{**OPTIONS.__dict__, "questions": 0.5})
    task = GistTask(model.decoder, [corpus("a")], PooledMaker(pools(model)), options, questions=source)
    rng = random.Random(2)
    with torch.no_grad():
        kinds = ["answer_nll" in task.loss(rng)[1] for _ in range(12)]
    assert 2 < sum(kinds) < 10


def test_questions_need_articles(model: LoadedModel, corpus: Callable[[str], Corpus]) -> None:
    with pytest.raises(InputError, match="articles"):
        GistTask(model.decoder, [corpus("a")], pools(model), OPTIONS)
    with pytest.raises(InputError, match="articles"):
        QuestionSource(model, [], K)
