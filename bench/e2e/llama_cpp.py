"""The rival in C++: llama.cpp on the same GGUF file, with the whole text in its window."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.e2e.process import resident_memory
from bench.peers import llama_cpp as peer
from bench.peers.llama_cpp import Context, Model

NAME = peer.NAME
BATCH = 512  # tokens of the prompt per forward, llama.cpp's own default
WARM_UP = 8  # tokens: the first forward reads the weights from disk


def missing() -> str | None:
    """Why it cannot run here; None if it can."""
    return peer.missing(torch.device("cpu"))


class Window(Context):
    """One sequence of given token ids, decoded greedily."""

    def __init__(self, model: Model, n_ctx: int, n_threads: int, *, flash_attention: bool = False) -> None:
        super().__init__(model, n_ctx, n_threads=n_threads, n_batch=BATCH, flash_attention=flash_attention)
        self.vocabulary = int(self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(model.pointer)))

    def read(self, ids: Sequence[int]) -> int:
        """Append tokens; returns the most probable next one."""
        for begin in range(0, len(ids), BATCH):
            if status := self.decode(ids[begin : begin + BATCH]):
                raise RuntimeError(f"llama_decode: expected status 0, got {status}: {self.log.last}")
        logits = self.lib.llama_get_logits_ith(self.pointer, -1)  # waits for the result
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)

    def generate(self, ids: Sequence[int], steps: int) -> tuple[list[int], float, list[float]]:
        """The 1 + `steps` tokens that follow `ids`, seconds to the first, seconds of each further one."""
        begin = time.perf_counter()
        tokens = [self.read(ids)]
        first, seconds = time.perf_counter() - begin, []
        for _ in range(steps):
            begin = time.perf_counter()
            tokens.append(self.read(tokens[-1:]))
            seconds.append(time.perf_counter() - begin)
        return tokens, first, seconds


def measure(
    model_gguf: Path,
    prompt_ids: Sequence[int],
    n_decode: int,
    n_ctx: int,
    n_threads: int,
    *,
    flash_attention: bool = False,
) -> dict[str, Any]:
    """Read a prompt and decode greedily.

    flash_attention: off, because on a CPU it is the slower of llama.cpp's two kernels from about a thousand entries on.

    Returns `prefill_s` (time to the first token), `ms_per_token` (median) with its quartiles `spread`, `tokens` (what
    was generated) and `rss_mb` (how much larger the process is with model and window, None where the system does not
    say). Raises ValueError if prompt and answer do not fit in `n_ctx`.
    """
    if not 0 < len(prompt_ids) <= n_ctx - n_decode:
        raise ValueError(f"prompt_ids: expected 1 to {n_ctx - n_decode} tokens, got {len(prompt_ids)}")
    if n_decode < 1:
        raise ValueError(f"n_decode: expected at least 1, got {n_decode}")
    before = resident_memory()
    window = Window(Model(model_gguf), n_ctx, n_threads, flash_attention=flash_attention)
    window.read(prompt_ids[:WARM_UP])
    window.clear()
    tokens, first, seconds = window.generate(prompt_ids, n_decode)
    after = resident_memory()
    low, median, high = (round(float(x) * 1e3, 3) for x in np.percentile(seconds, (25, 50, 75)))
    return {
        "prefill_s": first, "ms_per_token": median, "spread": [low, high], "tokens": tokens,
        "rss_mb": round((sum(after.values()) - sum(before.values())) / 1e6, 1) if after else None,
    }  # fmt: skip
