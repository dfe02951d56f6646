"""What the base model itself replies to questions when it is shown the passage that answers them, and nothing else.

Answers as people marked them ("Nathan Knorr") are not what a chat model says ("The third president was Nathan Knorr"):
gists that are trained on them learn to ask for terse answers. Its own replies are what it should go on giving behind
gists: context distillation on replies of its own (Snell et al. 2022; Eyuboglu et al. 2025, "Cartridges").
"""

from __future__ import annotations

import json
import lzma
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.model.stores import ConcatStore

from .lens_questions import Article, article_tokens, says

# Tokens of the text shown on either side of the answer: about what a memory opens.
AROUND = 48


@dataclass(frozen=True)
class Reply:
    """ends: whether the model ended it within the tokens that it was given."""

    text: str
    ends: bool


@torch.inference_mode()
def greedy_replies(model: LoadedModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[Reply]:
    """The likeliest replies, decoded together."""
    decoder, ends = model.decoder, torch.tensor(model.tokenizer.eos_ids, device=model.decoder.device)
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    at = torch.full_like(ids, -1)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        at[row, : len(prompt)] = torch.arange(len(prompt))
    ids, at = ids.to(decoder.device), at.to(decoder.device)
    last = (at >= 0).sum(1) - 1
    store = ConcatStore()
    hidden = decoder(decoder.embed(ids), at, store).hidden
    rows = torch.arange(len(prompts), device=decoder.device)
    hidden, said = hidden[rows, last], list[Tensor]()
    done = torch.zeros(len(prompts), dtype=torch.bool, device=decoder.device)
    for step in range(tokens):
        chosen = (hidden @ decoder.head.T).argmax(-1)
        said.append(chosen)
        done |= torch.isin(chosen, ends)
        if bool(done.all()):
            break
        hidden = decoder(decoder.embed(chosen[:, None]), last[:, None] + 1 + step, store).hidden[:, 0]
    stops = set(model.tokenizer.eos_ids)
    replies = []
    for row in torch.stack(said, 1).tolist():
        length = next((i for i, token in enumerate(row) if token in stops), None)
        replies.append(Reply(model.tokenizer.decode(row[:length]), ends=length is not None))
    return replies


def own_replies(
    model: LoadedModel,
    articles: Sequence[Article],
    *,
    limit: int | None = None,
    minutes: float | None = None,
    batch: int = 64,
    tokens: int = 48,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda asked, kept: None,
) -> dict[tuple[int, int], Reply]:
    """(article, question) -> reply, of drawn questions, where the first `tokens` of the reply hold the answer.

    limit: questions that are asked at most; minutes: stop after so long. progress: asked and kept so far.
    """
    begin, kept, asked = time.monotonic(), dict[tuple[int, int], Reply](), 0
    prompts = _prompts(model, articles, random.Random(seed), limit)
    while group := sorted(islice(prompts, batch), key=lambda one: len(one[2])):
        replies = greedy_replies(model, [prompt for _, _, prompt in group], tokens)
        for (key, answer, _), reply in zip(group, replies, strict=True):
            if says(reply.text, answer):
                kept[key] = reply
        asked += len(group)
        progress(asked, len(kept))
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
    return kept


def _prompts(
    model: LoadedModel, articles: Sequence[Article], rng: random.Random, limit: int | None
) -> Iterator[tuple[tuple[int, int], str, list[int]]]:
    """Whose question it is, the answer, and the tokens up to where the reply begins. Article by article, each
    tokenised once."""
    system = model.chat.system_ids(DEFAULT_SYSTEM_PROMPT)
    pairs = [(which, number) for which, article in enumerate(articles) for number in range(len(article.questions))]
    chosen: dict[int, list[int]] = {}
    for which, number in rng.sample(pairs, min(len(pairs), limit or len(pairs))):
        chosen.setdefault(which, []).append(number)
    for which, numbers in chosen.items():
        article = articles[which]
        text, found = article_tokens(model.tokenizer, article)
        places = {id(question): (start, stop) for question, start, stop in found}
        for number in numbers:
            question = article.questions[number]
            start, stop = places[id(question)]
            passage = text[max(0, start - AROUND) : stop + AROUND]
            yield (which, number), question.answer, [*system, *passage, *model.chat.user_turn_ids(question.text)]


def write_articles(path: Path, articles: Sequence[Article], replies: dict[tuple[int, int], Reply]) -> int:
    """Write the articles in SQuAD's format with the questions that have a reply, which stands beside the answer.
    Returns how many there are. Raises InputError if the file cannot be written."""
    data = []
    for which, article in enumerate(articles):
        paragraphs = [{"context": text, "qas": list[dict[str, object]]()} for text in article.paragraphs]
        for number, question in enumerate(article.questions):
            if (which, number) in replies:
                reply = replies[which, number]
                answer: dict[str, object] = {"text": question.answer, "answer_start": question.answer_start}
                answer |= {"reply": reply.text, "reply_ends": reply.ends}
                qas = paragraphs[question.paragraph]["qas"]
                assert isinstance(qas, list)
                qas.append({"question": question.text, "answers": [answer]})
        data.append({"title": article.title, "paragraphs": paragraphs})
    text = json.dumps({"version": "1.1", "data": data}, ensure_ascii=False).encode()
    try:
        partial = path.with_name(f"{path.name}.part")
        partial.write_bytes(lzma.compress(text) if path.suffix == ".xz" else text)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"out: {path} cannot be written ({error})") from error
    return len(replies)
