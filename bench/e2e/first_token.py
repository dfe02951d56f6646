"""How long the first token takes: of a memory that holds a text, and of rivals that read the same text.

The memory has read the text before it is asked; that is what `ingest` measures, and what a rival would have to keep in
its cache to answer as fast ("question alone").
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.e2e.history import QUESTIONS
from bench.e2e.memories import memory_settings
from bench.e2e.report import Spread
from mc_runtime import Session
from mc_runtime.model import LoadedModel


def measure_memory(
    directory: Path, model: LoadedModel, ids: NDArray[np.int64], budget: int, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Ingest `ids` through the model, then ask: the first question assembles the context, later ones edit it."""
    with Session.open(directory, model, **memory_settings(budget)) as session:
        start = time.perf_counter()
        session.ingest(ids, mode="contextual", progress=progress)
        ingest = time.perf_counter() - start
        for question in QUESTIONS:
            session.generate(question, max_new_tokens=1)
        seconds = [turn.time_to_first_token for turn in session.stats().turns]
    return {
        "tokens": len(ids),
        "ingest_s": round(ingest, 3),
        "ingest_tokens_per_s": round(len(ids) / ingest, 1),
        "first_question_s": round(seconds[0], 4),
        "later_question_s": Spread.of(seconds[1:]).median,
    }


def measure_fast_ingest(directory: Path, model: LoadedModel, ids: NDArray[np.int64], budget: int) -> dict[str, Any]:
    """Seconds to ingest `ids` without the model."""
    with Session.open(directory, model, **memory_settings(budget)) as session:
        start = time.perf_counter()
        session.ingest(ids, mode="fast")
        seconds = time.perf_counter() - start
    return {"tokens": len(ids), "seconds": round(seconds, 3), "tokens_per_s": round(len(ids) / seconds, 1)}


def longest_question(model: LoadedModel) -> int:
    """Tokens of the longest question as a turn of the chat."""
    return max(len(model.chat.user_turn_ids(question)) for question in QUESTIONS)
