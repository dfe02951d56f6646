"""A small history with one fact, and the settings of the readers that are asked about it."""

from __future__ import annotations

import random

import numpy as np

from mc_runtime.config import MemoryConfig
from mc_runtime.eval.readers import History, Question, Span
from mc_runtime.model import LoadedModel

CONFIG = MemoryConfig(
    budget=384, block_size=8, recent_tokens=24, ingest_chunk=64, ingest_window=128, system_prompt="be brief"
)
WORDS = ("sea", "wind", "house", "keeper", "lamp", "night", "rain", "bread", "dog", "hill", "boat", "stone")
FACT = " Zorblat keeps 48213. "


def text(count: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return "".join(rng.choice(WORDS) + rng.choice(". ,") for _ in range(count))[:count]


def system(model: LoadedModel) -> list[int]:
    return model.chat.system_ids(CONFIG.system_prompt)


def small_history(model: LoadedModel) -> History:
    return History(np.asarray(model.tokenizer.encode(text(450, 1) + FACT + text(450, 2)), np.int64))


def fact_question() -> Question:
    return Question(
        prompt="What does Zorblat keep?",
        answers=("48213",),
        candidates=(" 48213", " 51", " 99999"),
        evidence=(Span(450, 450 + len(FACT)),),
        opening="Zorblat keeps",
        max_new_tokens=5,
    )
