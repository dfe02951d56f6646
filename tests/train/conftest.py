"""The tiny model and its helpers live with the runtime's tests."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "runtime"))

from tiny import tiny_model

from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.lens_questions import Article, read_articles


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return tiny_model()


@pytest.fixture
def articles(tmp_path: Path) -> list[Article]:
    told = []
    for name in ("Ada", "Bob", "Cleo", "Dan"):
        paragraphs = []
        for number in range(6):
            context = f"{name} keeps lamp {number}. It is the {number + 3}th lamp that {name} has had in this house."
            answer = {"text": f"{number + 3}th", "answer_start": context.index(f"{number + 3}th")}
            paragraphs.append({"context": context, "qas": [{"question": f"Which {number}?", "answers": [answer]}]})
        told.append({"title": name, "paragraphs": paragraphs})
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"data": told}))
    return read_articles(path)


@pytest.fixture
def corpus(tmp_path: Path, model: LoadedModel) -> Callable[[str], Corpus]:
    """A text of repeated sentences, so that what follows can be known from what came before."""

    def make(name: str = "text") -> Corpus:
        rng = random.Random(name)
        names = ["Ada", "Bob", "Cleo", "Dan"]
        lines = [f"{rng.choice(names)} keeps the number {rng.randrange(100)} in a box.\n" for _ in range(400)]
        path = tmp_path / f"{name}.txt"
        path.write_text("".join(lines))
        return Corpus.open(path, model.tokenizer, tmp_path / "cache")

    return make
