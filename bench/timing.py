"""Interleaved timing of several callables: A B A B ..., so that a machine whose speed drifts treats all alike.

A round times every candidate once, in an order that is shuffled from round to round. One sample is the mean of a short
burst of calls (`calls` of them, so that a burst is long against the clock), each on the next of its rotating inputs.
Two untimed bursts of each come first. Medians and spreads come from the samples; ratios are taken round by round.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

# A burst lasts at least this long, unless flushing allows only one call.
BURST_SECONDS = 300e-6
MAX_CALLS = 256


@dataclass(frozen=True)
class Timed:
    """One candidate's samples, in seconds per call and in the order of the rounds.

    spread: half the distance between the 10th and the 90th percentile over the median: what a second run may differ by.
    """

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        if len(self.samples) < 2:
            return float("inf")
        low, *_, high = statistics.quantiles(self.samples, n=10, method="inclusive")
        return (high - low) / 2 / self.median


def ratio(a: Timed, b: Timed) -> float:
    """Median over the rounds of a's time over b's."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


Clock = Callable[[], float]


class Stopwatch:
    """Seconds of a burst on one device: for a CPU those of `clock` (None: wall time), for CUDA those between events."""

    def __init__(self, device: torch.device, clock: Clock | None = None) -> None:
        self.cuda, self.clock = device.type == "cuda", clock or time.perf_counter
        if self.cuda:
            self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, burst: Callable[[], object]) -> float:
        if not self.cuda:
            begin = self.clock()
            burst()
            return self.clock() - begin
        torch.cuda.synchronize()
        self.start.record()
        burst()
        self.end.record()
        self.end.synchronize()
        return float(self.start.elapsed_time(self.end)) / 1e3


class Burst:
    """Successive calls of `run`, each on the next of `states`."""

    def __init__(self, run: Callable[[object], object], states: Sequence[object]) -> None:
        self.run, self.states, self.next, self.calls = run, states, 0, 1

    def __call__(self) -> None:
        run, states, n = self.run, self.states, len(self.states)
        at = self.next
        for _ in range(self.calls):
            run(states[at])
            at = (at + 1) % n
        self.next = at


def interleave(
    bursts: Sequence[Burst],
    device: torch.device,
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    flush: Callable[[], object] | None = None,
    seed: int = 0,
    clock: Clock | None = None,
) -> list[Timed]:
    """Time the bursts in alternation for about `seconds` of `clock`, at least `min_rounds` rounds.

    flush: called, untimed, before every burst; a burst is then a single call, since its second would find a warm cache.
    """
    clock = clock or time.perf_counter
    watch, order = Stopwatch(device, clock), list(range(len(bursts)))
    for burst in bursts:
        first = watch(burst)
        estimate = min(first, watch(burst)) if first < seconds else first
        burst.calls = 1 if flush else max(1, min(MAX_CALLS, round(BURST_SECONDS / max(estimate, 1e-9))))
    samples: list[list[float]] = [[] for _ in bursts]
    shuffler, begin, rounds = random.Random(seed), clock(), 0
    while rounds < min_rounds or (rounds < max_rounds and clock() - begin < seconds):
        shuffler.shuffle(order)
        for i in order:
            if flush:
                flush()
            samples[i].append(watch(bursts[i]) / bursts[i].calls)
        rounds += 1
    return [Timed(tuple(s), b.calls) for s, b in zip(samples, bursts, strict=True)]
