"""The rival that reads everything: transformers, with a text in its window."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

NAME = "transformers"


def missing() -> str | None:
    """Why it cannot run here; None if it can."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "pip install transformers"
    return None


def load(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a Hugging Face directory, with fused attention."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
    finally:
        if bars:
            logging.enable_progress_bar()
    loaded: Any = model.eval()
    return loaded.to(device)


class TransformersWindow:
    """One sequence in a key-value cache, decoded greedily by a loop of forwards, without the overhead of `generate`.

    static: `StaticCache` of `window` tokens, else `DynamicCache`.
    """

    def __init__(self, model: Any, window: int, *, static: bool) -> None:
        from transformers import DynamicCache, StaticCache

        self.model, self.window, self.static = model, window, static
        self._cache: Any = (
            StaticCache(config=model.config, max_cache_len=window) if static else DynamicCache(config=model.config)
        )
        self.used = 0
        self.decode: list[float] = []
        self._next = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def read(self, ids: list[int]) -> float:
        """Read tokens up to the first token of the answer; returns seconds."""
        if not ids or self.used + len(ids) > self.window:
            raise ValueError(f"ids: expected 1 to {self.window - self.used} tokens, got {len(ids)}")
        start = time.perf_counter()
        self._forward(torch.tensor([ids], device=self.model.device))
        return time.perf_counter() - start

    @torch.inference_mode()
    def step(self) -> None:
        """Decode one token, unless the window is full."""
        if self.used >= self.window:
            return
        start = time.perf_counter()
        self._forward(self._next)
        self.decode.append(time.perf_counter() - start)

    def _forward(self, ids: torch.Tensor) -> None:
        output = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self.used += ids.shape[1]
        self._next = output.logits[:, -1:].argmax(-1)
        if self._next.is_cuda:
            torch.cuda.synchronize(self._next.device)


def faster_cache(model: Any, ids: list[int], steps: int = 6) -> bool:
    """Whether decoding is faster with a static cache than with a dynamic one, measured in alternation."""
    runs = {static: TransformersWindow(model, len(ids) + steps, static=static) for static in (False, True)}
    for run in runs.values():
        run.read(ids)
    for _ in range(steps):
        for run in runs.values():
            run.step()
    best = {static: sorted(run.decode)[len(run.decode) // 2] for static, run in runs.items()}
    return best[True] < best[False]
