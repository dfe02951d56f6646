"""How the next token is chosen."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .errors import InputError, ModelError

Weights = npt.NDArray[np.float32]

LEAST_TEMPERATURE = 1e-30  # below it every token but the best has a weight of 0 in fp32, and it may be 0 there itself
ROW = 1024


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
        """logits [rows of the model] -> token id. Of equal ones the greedy choice is the lowest id. Raises ModelError
        where one has to be drawn and a logit is NaN or the greatest is not finite."""
        p, logits = self.params, logits[: self.vocab_size].detach()
        if p.temperature == 0:
            return best(logits)
        scores = logits.to(torch.float32, copy=True).cpu()
        top = float(scores.max())
        if not math.isfinite(top):
            raise ModelError(f"logits: expected no NaN and a greatest one that is finite, got {top}")
        # Below the best one, so that nothing overflows at a temperature near 0: all others are then 0.
        weights = scores.sub_(top).div_(max(p.temperature, LEAST_TEMPERATURE)).exp_().numpy()
        keep_best(weights, p.top_k, p.top_p)
        return first_to_reach(weights, 1 - float(torch.rand((), dtype=torch.float64, generator=self._generator)))


def best(logits: Tensor) -> int:
    """The first of the greatest of logits [N], N >= 1."""
    if logits.device.type != "cpu":
        return int(logits.argmax())
    # torch's search of a CPU's tensor takes thirty times as long as NumPy's.
    if logits.dtype == torch.bfloat16:
        bits = logits.view(torch.int16).numpy()
        first = int(bits.argmax())
        if bits[first] > 0:  # numbers above 0 have the order of their bits
            return first
    return int(logits.float().numpy().argmax())


def keep_best(weights: Weights, top_k: int, top_p: float) -> None:
    """Sets to 0 in place all of `weights` [N] but the top_k greatest (0: all), and of these all but the fewest greatest
    that have a share of top_p, the one that reaches it included. Of equal ones those of the lowest ids stay."""
    n = len(weights)
    count = min(top_k, n) if top_k else n
    if count == n and top_p == 1:
        return
    # Only values are sorted: sorting ids by them takes four times as long.
    order = np.sort(weights if count == n else np.partition(weights, n - count)[n - count :])[::-1]
    if top_p < 1:
        count = 1 + first_to_reach(order, top_p)
    least = order[count - 1]
    above, equal = int(np.count_nonzero(weights > least)), np.flatnonzero(weights == least)
    weights *= weights >= least  # ten times as fast as an assignment to where it is not
    weights[equal[count - above :]] = 0


def first_to_reach(weights: Weights, share: float) -> int:
    """The first index up to which `weights` [N], at least 0 and not all 0, add up to a share above 0 of their sum.

    For a uniform share this draws in proportion to them. torch.multinomial draws a number for each of them, which takes
    ten times as long for a vocabulary."""
    # Sums of rows first, in fp64: running sums of all in fp64 are memory fresh from the system.
    sums = np.add.reduceat(weights, np.arange(0, len(weights), ROW), dtype=np.float64).cumsum()
    wanted = share * sums[-1]
    row = int(np.searchsorted(sums, wanted))
    inside = weights[row * ROW : (row + 1) * ROW].cumsum(dtype=np.float64)
    # The row's own running sums may be rounded otherwise than the rows'.
    wanted = min(wanted - (sums[row - 1] if row else 0.0), inside[-1])
    return row * ROW + int(np.searchsorted(inside, wanted))


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
