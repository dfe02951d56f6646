"""Interleaved timing of several callables: A B A B ..., so that a machine whose speed drifts treats all alike.

A round times every candidate once, in an order that is shuffled from round to round. One sample is the mean of a short
burst of calls (`calls` of them, so that a burst is long against the clock), each on the next of its rotating inputs.
Some untimed bursts of each come first, and on a CPU an untimed call before every burst of short ones: what ran in
between has evicted code as well as inputs, and a loop finds its code where the last call left it. Medians and spreads
come from the samples; ratios are taken round by round. On a GPU a sample is the device's own time and the host's stands
beside it (`held`).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .held import LEAST_HOLD, LONGEST_HOLD, MARGIN, CudaStream, Hold, Stream, timed

# A burst lasts at least this long, unless flushing allows only one call. (On a GPU it then has a few hundred launches
# at most: about a thousand can be queued.)
BURST_SECONDS = 300e-6
MAX_CALLS = 256
# Calls on a CPU that take less are led in by an untimed one: of longer ones cold code is a small part.
LED_IN_SECONDS = 5e-3
# Of the time that a candidate is measured, at most so often as long until it has met all its inputs.
FIRST_MEETINGS = 4
# Of what a hold may last at most, the host may need this share: other work on the machine makes it slower at times.
HELD_SHARE = 0.25


@dataclass(frozen=True)
class Timed:
    """One candidate's samples, in seconds per call and in the order of the rounds.

    spread: half the distance between the 10th and the 90th percentile over the median: what a second run may differ by.
    hosts: on a GPU, what the host took to issue a call, in the same order; empty elsewhere and where the call waits for
        the device. Then (`waits`) the samples include its part.
    """

    samples: tuple[float, ...]
    calls: int
    hosts: tuple[float, ...] = ()
    waits: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        if len(self.samples) < 2:
            return float("inf")
        low, *_, high = statistics.quantiles(self.samples, n=10, method="inclusive")
        return (high - low) / 2 / self.median

    @property
    def host(self) -> float | None:
        return statistics.median(self.hosts) if self.hosts else None


def ratio(a: Timed, b: Timed) -> float:
    """Median over the rounds of a's time over b's."""
    return statistics.median(x / y for x, y in zip(a.samples, b.samples, strict=True))


Clock = Callable[[], float]


class Burst:
    """Successive calls of `run`, each on the next of `states`, from the first or the one that `start` says."""

    def __init__(self, run: Callable[[object], object], states: Sequence[object], start: int = 0) -> None:
        self.run, self.states, self.next, self.calls, self.hold = run, states, start, 1, Hold()
        self.led_in = False

    def __call__(self) -> None:
        self._run(self.calls)

    def once(self) -> None:
        self._run(1)

    def _run(self, calls: int) -> None:
        run, states, n = self.run, self.states, len(self.states)
        at = self.next
        for _ in range(calls):
            run(states[at])
            at = (at + 1) % n
        self.next = at


class Stopwatch:
    """Seconds of a burst on one device: for a CPU those of `clock` (None: wall time) and no others, for a GPU its own
    and the host's (see `held.timed`).

    stream: of a GPU; None: that of `device`, if that is one.
    """

    def __init__(self, device: torch.device, clock: Clock | None = None, stream: Stream | None = None) -> None:
        self.clock = clock or time.perf_counter
        self.stream = CudaStream(device) if stream is None and device.type == "cuda" else stream

    def __call__(self, burst: Burst) -> tuple[float, float | None]:
        if self.stream is None:
            begin = self.clock()
            burst()
            return self.clock() - begin, None
        return timed(burst, burst.hold, self.stream, self.clock)

    def prepare(self, burst: Burst, seconds: float, single: bool) -> None:
        """Run a burst untimed and give it its number of calls. single: one. seconds: a first call that takes longer (it
        compiles, say) is not followed by a second on a CPU."""
        if self.stream is not None:
            self._prepare_held(burst, single)
            return
        first, _ = self(burst)
        estimate = min(first, self(burst)[0]) if first < seconds else first
        burst.calls = 1 if single else calls_of(estimate)
        burst.led_in = not single and estimate < LED_IN_SECONDS

    def meet_all(self, burst: Burst, seconds: float) -> None:
        """Every one of the inputs once, or as many as `seconds` hold: on its first a call may have more to do (it packs
        weights, say). On a GPU nothing is done."""
        if self.stream is not None:
            return
        begin = self.clock()
        for _ in burst.states[1:]:
            burst.once()
            if self.clock() - begin > seconds:
                return

    def _prepare_held(self, burst: Burst, single: bool) -> None:
        burst()
        estimate, host = self(burst)
        if not single:
            burst.calls = calls_of(estimate)
            if host is not None:
                burst.calls = max(1, min(burst.calls, int(HELD_SHARE * LONGEST_HOLD / max(host, 1e-9))))
                burst.hold.seconds = min(LONGEST_HOLD, MARGIN * burst.calls * host + LEAST_HOLD)
        _, queued = self(burst)  # with as many calls it may have to wait, where one did not
        if host is not None and queued is None and not single:
            burst.calls = 1
            burst.calls = calls_of(self(burst)[0])


def calls_of(estimate: float) -> int:
    """Calls of a burst, for one that takes so many seconds."""
    return max(1, min(MAX_CALLS, round(BURST_SECONDS / max(estimate, 1e-9))))


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
    stream: Stream | None = None,
) -> list[Timed]:
    """Time the bursts in alternation for about `seconds` of `clock`, at least `min_rounds` rounds.

    flush: called, untimed, before every burst; a burst is then a single call, since its second would find a warm cache.
    stream: as of `Stopwatch`.
    """
    clock = clock or time.perf_counter
    watch, order = Stopwatch(device, clock, stream), list(range(len(bursts)))
    for burst in bursts:
        watch.prepare(burst, seconds, single=flush is not None)
        watch.meet_all(burst, FIRST_MEETINGS * seconds / len(bursts))
    samples: list[list[float]] = [[] for _ in bursts]
    hosts: list[list[float]] = [[] for _ in bursts]
    shuffler, begin, rounds = random.Random(seed), clock(), 0
    while rounds < min_rounds or (rounds < max_rounds and clock() - begin < seconds):
        shuffler.shuffle(order)
        for i in order:
            if flush:
                flush()
            if bursts[i].led_in:
                bursts[i].once()
            taken, host = watch(bursts[i])
            samples[i].append(taken / bursts[i].calls)
            if host is not None:
                hosts[i].append(host / bursts[i].calls)
        rounds += 1
    waits = [watch.stream is not None and b.hold.waits for b in bursts]
    return [
        Timed(tuple(s), b.calls, () if w else tuple(h), w)
        for s, h, b, w in zip(samples, hosts, bursts, waits, strict=True)
    ]
