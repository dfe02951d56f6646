"""Interleaving, rotation of inputs, rounds, and what is read from the samples. No clock decides a test."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from bench import timing
from bench.timing import BURST_SECONDS, LED_IN_SECONDS, MAX_CALLS, Burst, Timed, interleave, ratio

CPU = torch.device("cpu")


class Clock:
    """Stands in for `time.perf_counter`: it moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def taking(self, seconds: float, then: Callable[[object], object] = lambda _: None) -> Callable[[object], object]:
        """A call that takes this long."""

        def run(state: object) -> object:
            self.now += seconds
            return then(state)

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_candidates_alternate(clock: Clock) -> None:
    calls: list[str] = []
    bursts = [Burst(clock.taking(0.01, lambda _, name=name: calls.append(name)), [None]) for name in "abc"]
    timed = interleave(bursts, CPU, seconds=0.3)
    rounds = len(timed[0].samples)
    measured = calls[-3 * rounds :]
    assert rounds == 10
    groups = [measured[i : i + 3] for i in range(0, len(measured), 3)]
    assert all(sorted(group) == ["a", "b", "c"] for group in groups), "a round times everyone once"
    assert len({tuple(group) for group in groups}) > 1, "the order changes from round to round"


def test_same_seed_same_order(clock: Clock) -> None:
    def order(seed: int) -> list[str]:
        calls: list[str] = []
        bursts = [Burst(clock.taking(0.01, lambda _, name=name: calls.append(name)), [None]) for name in "abcd"]
        interleave(bursts, CPU, seconds=0.5, seed=seed)
        return calls

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_states_rotate(clock: Clock) -> None:
    seen: list[object] = []
    burst = Burst(clock.taking(BURST_SECONDS / 4, seen.append), ["x", "y", "z"])
    interleave([burst], CPU, seconds=0.0)
    assert burst.calls == 4
    assert seen == [["x", "y", "z"][i % 3] for i in range(len(seen))]
    assert len(seen) >= 5 * 4


def test_every_state_is_met_before_the_rounds(clock: Clock) -> None:
    """A first call on an input may have more to do. A burst begins where it is told to."""
    seen: list[object] = []
    states = list(range(40))
    interleave([Burst(clock.taking(1e-3, seen.append), states, start=30)], CPU, seconds=0.05, min_rounds=3)
    assert seen[0] == 30
    assert set(seen[:43]) == set(states)


def test_meeting_all_states_ends_in_time(clock: Clock) -> None:
    seen: list[object] = []
    bursts = [Burst(clock.taking(0.01, seen.append), list(range(10_000)))]
    interleave(bursts, CPU, seconds=0.05, min_rounds=3, max_rounds=3)
    assert len(seen) < 40


@pytest.mark.parametrize(("call", "led_in"), [(LED_IN_SECONDS / 10, True), (LED_IN_SECONDS * 2, False)])
def test_short_calls_are_led_in_untimed(clock: Clock, call: float, led_in: bool) -> None:
    """The first call of a burst finds its code cold: here it takes ten times as long where another ran before."""
    last = ["none"]

    def one(name: str) -> Callable[[object], None]:
        def run(_: object) -> None:
            clock.now += call if last[0] == name else 10 * call
            last[0] = name

        return run

    bursts = [Burst(one("a"), [None]), Burst(one("b"), [None])]
    timed = interleave(bursts, CPU, seconds=0.0, min_rounds=9)
    warm = [t.median == pytest.approx(call) for t in timed]
    assert all(warm) == led_in


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [(0.0, 3), (0.045, 5), (10.0, 8)],
    ids=["at least min_rounds", "until the time is up", "at most max_rounds"],
)
def test_rounds(clock: Clock, seconds: float, rounds: int) -> None:
    (timed,) = interleave([Burst(clock.taking(0.01), [None])], CPU, seconds=seconds, min_rounds=3, max_rounds=8)
    assert len(timed.samples) == rounds


@pytest.mark.parametrize(
    ("call", "expected"),
    [(BURST_SECONDS / 10, 10), (BURST_SECONDS * 3, 1), (1e-9, MAX_CALLS)],
    ids=["short", "long", "very short"],
)
def test_bursts_are_long_against_the_clock(clock: Clock, call: float, expected: int) -> None:
    (timed,) = interleave([Burst(clock.taking(call), [None])], CPU, seconds=0.01)
    assert timed.calls == expected
    assert timed.median == pytest.approx(call), "a sample is the time of one call"


def test_flush_comes_before_every_burst_and_is_not_timed(clock: Clock) -> None:
    events: list[str] = []
    flush = clock.taking(5.0, lambda _: events.append("flush"))
    bursts = [Burst(clock.taking(1e-6, lambda _: events.append("run")), [None]) for _ in range(2)]
    timed = interleave(bursts, CPU, seconds=0.0, flush=lambda: flush(None))
    assert [t.calls for t in timed] == [1, 1], "a second call would find a warm cache"
    measured = events[events.index("flush") :]
    assert measured == ["flush", "run"] * (2 * 5)
    assert timed[0].median == pytest.approx(1e-6)


def test_another_clock(clock: Clock) -> None:
    thread = Clock.__new__(Clock)
    thread.now = 0.0
    burst = Burst(thread.taking(0.02), [None])
    (timed,) = interleave([burst], CPU, seconds=0.2, clock=lambda: thread.now)
    assert len(timed.samples) in (10, 11)  # sums of 0.02
    assert timed.median == pytest.approx(0.02)
    assert clock.now == 100.0


def test_a_slow_first_call_is_made_once_before_the_rounds(clock: Clock) -> None:
    calls: list[object] = []
    interleave([Burst(clock.taking(2.0, calls.append), [None])], CPU, seconds=1.0, min_rounds=5)
    assert len(calls) == 1 + 5


def test_a_first_call_that_compiles_does_not_shape_the_burst(clock: Clock) -> None:
    durations = iter([1.0])

    def run(_: object) -> None:
        clock.now += next(durations, BURST_SECONDS / 5)

    (timed,) = interleave([Burst(run, [None])], CPU, seconds=2.0, max_rounds=5)
    assert timed.calls == 5


def test_real_clock_tells_slow_from_fast() -> None:
    """The one test with a real clock: a sleep of 20 ms against nothing."""
    bursts = [Burst(lambda _: time.sleep(0.02), [None]), Burst(lambda _: None, [None])]
    slow, fast = interleave(bursts, CPU, seconds=0.05, min_rounds=3)
    assert slow.median >= 0.02
    assert ratio(slow, fast) > 10


def test_median_and_spread() -> None:
    timed = Timed(tuple(float(x) for x in range(1, 12)), calls=1)
    assert timed.median == 6.0
    assert timed.spread == pytest.approx((10.0 - 2.0) / 2 / 6.0), "half of 10% to 90% over the median"
    assert Timed((3.0, 3.0, 3.0), 1).spread == 0.0
    assert Timed((3.0,), 1).spread == float("inf"), "one sample says nothing about a second run"


def test_spread_forgives_one_outlier() -> None:
    assert Timed((1.0,) * 30 + (50.0,), 1).spread == 0.0


def test_ratio_is_taken_round_by_round() -> None:
    """The machine becomes ten times slower on the way: the ratio does not notice, that of the medians would."""
    a = Timed((2.0, 2.0, 20.0, 20.0, 20.0), 1)
    b = Timed((1.0, 1.0, 10.0, 10.0, 10.0), 1)
    assert ratio(a, b) == 2.0
    shifted = Timed((10.0, 10.0, 1.0, 1.0, 1.0), 1)
    assert ratio(a, shifted) == 20.0
    with pytest.raises(ValueError, match="zip"):
        ratio(a, Timed((1.0,), 1))
