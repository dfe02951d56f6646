"""How the next token is chosen."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy. top_k 0 and top_p 1 do not restrict. Same seed, same text."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "top_p", "top_k", "seed"):
            if isinstance(getattr(self, name), bool):
                raise InputError(f"{name}: expected a number, got {getattr(self, name)!r}")
        if not (isinstance(self.max_new_tokens, int) and self.max_new_tokens >= 1):
            raise InputError(f"max_new_tokens: expected an integer of at least 1, got {self.max_new_tokens!r}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(self, name), int | float):
                raise InputError(f"{name}: expected a number, got {getattr(self, name)!r}")
        if not (self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 2**63)):
            raise InputError(f"seed: expected None or an integer from 0 to 2**63 - 1, got {self.seed!r}")
        if not 0 <= self.temperature <= sys.float_info.max:
            raise InputError(f"temperature: expected a number of at least 0, got {self.temperature!r}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p: expected a number above 0, up to 1, got {self.top_p!r}")
        if not (isinstance(self.top_k, int) and self.top_k >= 0):
            raise InputError(f"top_k: expected an integer of at least 0, got {self.top_k!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise InputError(f"stop: expected a tuple of non-empty strings, got {self.stop!r}")


def read_sampling(sampling: dict[str, Any]) -> SamplingParams:
    """From keyword arguments; `stop` may be a list. Raises InputError for those that are not fields."""
    try:
        if isinstance(sampling.get("stop"), list):
            sampling = sampling | {"stop": tuple(sampling["stop"])}
        return SamplingParams(**sampling)
    except TypeError as error:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise InputError(f"sampling: {', '.join(sampling)}: expected {known}") from error


class Sampler:
    """Draws token ids from logits; holds the random state of one answer."""

    def __init__(self, params: SamplingParams, vocab_size: int | None = None) -> None:
        """vocab_size: tokens that the tokenizer has. Models may have more rows, which stand for nothing."""
        self.params, self.vocab_size = params, vocab_size
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def __call__(self, logits: Tensor) -> int:
        """logits [rows of the model] -> token id. Ties of the greedy choice go to the lowest id."""
        p, logits = self.params, logits[: self.vocab_size]
        if p.temperature == 0:
            return int(logits.argmax())
        scores = logits.float().cpu()
        # Below the best one, and in fp64: at a temperature near 0 the others go to -inf, and nothing overflows.
        scores = ((scores - scores.max()).double() / p.temperature).float()
        if not p.top_k and p.top_p == 1:  # nothing to leave out: no sort of the vocabulary
            return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        order = scores.argsort(descending=True, stable=True)
        if p.top_k:
            order = order[: p.top_k]
        probabilities = scores[order].softmax(-1)
        # The smallest set of best tokens that reaches top_p, the one that crosses it included.
        keep = probabilities.cumsum(-1) - probabilities < p.top_p
        keep[0] = True  # a top_p that rounds to 0
        chosen = torch.multinomial(probabilities[keep], 1, generator=self._generator)
        return int(order[keep][chosen])


class StopStrings:
    """Cuts streamed text before the stop string that is complete first, and holds back what may be the beginning of
    one. However the text comes in pieces, the result is the same."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop, self._held, self.hit = stop, "", False

    def push(self, text: str) -> str:
        """Text that is safe to show. After `hit` there is none."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(s), at) for s in self.stop if (at := self._held.find(s)) >= 0]
        if found:
            _, start = min(found)
            shown, self._held, self.hit = self._held[:start], "", True
            return shown
        held = len(self._held)  # a stop string may be far longer
        starts = (n for s in self.stop for n in range(1, min(len(s), held + 1)) if self._held.endswith(s[:n]))
        keep = max(starts, default=0)
        shown, self._held = self._held[: held - keep], self._held[held - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        rest, self._held = ("" if self.hit else self._held), ""
        return rest
