"""Who is measured beside the memory, with the text in a plain window."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.e2e import llama_cpp, transformers_window
from bench.e2e.history import QUESTIONS
from bench.e2e.report import Spread
from bench.e2e.transformers_window import TransformersWindow
from mc_runtime.model import LoadedModel
from mc_runtime.model.resolve import PACKAGED


@dataclass(frozen=True)
class ReadWindow:
    """A window with its text and a question read. prefill: seconds for both; question: for the question alone."""

    window: TransformersWindow
    prefill: float
    question: float


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model is named by, None if it is named by something else."""
    if name in PACKAGED:
        spec = importlib.util.find_spec(PACKAGED[name].module)
        places = (spec.submodule_search_locations or ()) if spec else ()
        return next((file for place in places if (file := Path(place) / PACKAGED[name].file).is_file()), None)
    path = Path(name).expanduser()
    return path if path.is_file() else None


def absent(model: str, *, wanted: bool = True) -> dict[str, str]:
    """Rival -> why it does not run. wanted: False if none is asked for."""
    if not wanted:
        return dict.fromkeys((transformers_window.NAME, "llama.cpp"), "not asked for")
    reasons = {transformers_window.NAME: transformers_window.missing(), "llama.cpp": llama_cpp.missing()}
    if reasons["llama.cpp"] is None and gguf_file(model) is None:
        reasons["llama.cpp"] = f"it reads GGUF files, and {model} is none"
    return {name: reason for name, reason in reasons.items() if reason is not None}


def read_windows(
    model: LoadedModel, texts: dict[int, NDArray[np.int64]], progress: Callable[[], None]
) -> list[ReadWindow]:
    """transformers with each text in a window of its size, smallest first; progress: called after each."""
    peer = transformers_window.load(model.directory, model.decoder.dtype, model.decoder.device)
    question = list(model.chat.user_turn_ids(QUESTIONS[0]))
    static = transformers_window.faster_cache(peer, texts[min(texts)].tolist())
    windows = []
    for size, ids in sorted(texts.items()):
        window = TransformersWindow(peer, size, static=static)
        text = window.read(ids.tolist())
        asked = window.read(question)
        windows.append(ReadWindow(window, text + asked, asked))
        progress()
    return windows


def transformers_row(read: ReadWindow) -> dict[str, Any]:
    """What was measured, for the report."""
    window = read.window
    per_token = Spread.of(window.decode, 1e3)
    dtype = str(window.model.dtype).removeprefix("torch.")
    return {
        "name": transformers_window.NAME,
        "window": window.window,
        "settings": f"{dtype}, sdpa, {'static' if window.static else 'dynamic'} cache",
        "prefill_s": round(read.prefill, 3),
        "question_s": round(read.question, 4),
        "ms_per_token": per_token.median,
        "spread": [per_token.low, per_token.high],
    }


def llama_cpp_row(name: str, model: LoadedModel, window: int, ids: NDArray[np.int64], steps: int) -> dict[str, Any]:
    """The same with llama.cpp, from the GGUF file itself: its weights stay quantised."""
    file = gguf_file(name)
    assert file is not None
    prompt = [*ids.tolist(), *model.chat.user_turn_ids(QUESTIONS[0])]
    found = llama_cpp.measure(file, prompt, steps, window, torch.get_num_threads())
    return {
        "name": "llama.cpp",
        "window": window,
        "settings": file.stem.rpartition(".")[2],
        "prefill_s": round(float(found["prefill_s"]), 3),
        "question_s": None,
        "ms_per_token": round(float(found["ms_per_token"]), 3),
        "spread": list(found.get("spread") or (None, None)),
    }
