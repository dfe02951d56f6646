"""The model's own replies, as training data for gists."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.model.stores import ConcatStore
from mc_runtime.train.lens_questions import Article, TokenisedArticle, article_span, read_articles
from mc_runtime.train.replies import AROUND, Reply, greedy_replies, own_replies, write_articles

TOKENS = 6


def one_by_one(model: LoadedModel, prompt: list[int]) -> tuple[list[int], bool]:
    """Greedy decoding without a batch and without a cache."""
    ids, ends = list(prompt), set(model.tokenizer.eos_ids)
    for _ in range(TOKENS):
        x = model.decoder.embed(torch.tensor([ids]))
        hidden = model.decoder(x, torch.arange(len(ids))[None], ConcatStore()).hidden[0, -1]
        token = int((hidden @ model.decoder.head.T).argmax())
        if token in ends:
            return ids[len(prompt) :], True
        ids.append(token)
    return ids[len(prompt) :], False


@torch.no_grad()
def test_together_they_say_what_each_says_alone(model: LoadedModel) -> None:
    prompts = [model.tokenizer.encode(text) for text in ("a lamp", "the house of seven lamps and more", "x")]
    got = greedy_replies(model, prompts, TOKENS)
    for prompt, reply in zip(prompts, got, strict=True):
        ids, ended = one_by_one(model, prompt)
        assert reply == Reply(model.tokenizer.decode(ids), ended)


@torch.no_grad()
def test_a_reply_ends_at_an_end_token(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = model.tokenizer.encode("a lamp")
    ids, _ = one_by_one(model, prompt)
    monkeypatch.setattr(model.tokenizer, "eos_ids", (ids[2],))
    first = ids.index(ids[2])
    assert greedy_replies(model, [prompt], TOKENS) == [Reply(model.tokenizer.decode(ids[:first]), True)]


@pytest.fixture
def articles(tmp_path: Path) -> list[Article]:
    data = []
    for name in ("Ada", "Bob"):
        text = " ".join(f"{name} has lamp {i}." for i in range(40))
        qas = [
            {"question": f"Which of {i}?", "answers": [{"text": f"lamp {i}", "answer_start": text.index(f"lamp {i}")}]}
            for i in (3, 20)
        ]
        data.append({"title": name, "paragraphs": [{"context": text, "qas": qas}, {"context": "More.", "qas": []}]})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": data}))
    return read_articles(path)


def test_right_replies_are_kept_and_written(
    tmp_path: Path, model: LoadedModel, articles: list[Article], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passage around the answer is all that is shown; a reply counts where it holds the answer."""
    seen: list[str] = []

    def reply(_: LoadedModel, prompts: list[list[int]], tokens: int) -> list[Reply]:
        texts = [model.tokenizer.decode(prompt) for prompt in prompts]
        seen.extend(texts)
        system = len(model.chat.system_ids(DEFAULT_SYSTEM_PROMPT))
        longest = max(len(prompt) - system for prompt in prompts)
        assert longest < 2 * AROUND + 60
        assert tokens == 5
        return [
            Reply("It is Lamp 20, I think", False) if "of 20?" in text else Reply("lamp 33", True) for text in texts
        ]

    monkeypatch.setattr("mc_runtime.train.replies.greedy_replies", reply)
    steps: list[tuple[int, int]] = []
    kept = own_replies(model, articles, batch=3, tokens=5, progress=lambda *now: steps.append(now))
    assert kept == {(0, 1): Reply("It is Lamp 20, I think", False), (1, 1): Reply("It is Lamp 20, I think", False)}
    assert [asked for asked, _ in steps] == [3, 4]
    for text in seen:
        number = 20 if "of 20?" in text else 3
        name = "Ada" if "Ada" in text else "Bob"
        assert f"{name} has lamp {number}." in text
        assert ("Ada" in text) != ("Bob" in text)
    path = tmp_path / "replies.json.xz"
    assert write_articles(path, articles, kept) == 2
    again = read_articles(path)
    assert [a.paragraphs for a in again] == [a.paragraphs for a in articles]
    for article in again:
        (question,) = article.questions
        assert (question.answer, question.reply, question.reply_ends) == ("lamp 20", "It is Lamp 20, I think", False)
        assert article.paragraphs[0][question.answer_start :].startswith("lamp 20.")
    assert len(own_replies(model, articles, limit=1, batch=3, tokens=5, seed=2)) <= 1
    assert steps[-1] == (4, 2)
    with pytest.raises(InputError, match="out"):
        write_articles(tmp_path / "none" / "x.json", articles, kept)


def test_spans_of_an_article_that_was_tokenised_once(model: LoadedModel, articles: list[Article]) -> None:
    for article in articles:
        once = TokenisedArticle(model.tokenizer, article)
        found = 0
        for seed in range(8):
            for room in (20, 150, 400):
                want = article_span(model.tokenizer, article, random.Random(seed), room)
                assert once.span(random.Random(seed), room) == want
                found += len(want[1]) if want else 0
        assert found


def test_command(tmp_path: Path, model: LoadedModel, articles: list[Article], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    out = tmp_path / "replies.json"
    arguments = ["train", "replies", str(tmp_path / "questions.json"), "--out", str(out), "--tokens", "4"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [article.title for article in read_articles(out)] == ["Ada", "Bob"]
    result = CliRunner().invoke(cli.app, [*arguments, "--batch", "0"])
    assert result.exit_code != 0
