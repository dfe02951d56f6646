"""Timing behind a held stream, on a device that is simulated: no clock decides a test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch

from bench import held
from bench.held import LONGEST_HOLD, CudaStream
from bench.timing import BURST_SECONDS, MAX_CALLS, Burst, Timed, interleave

CPU = torch.device("cpu")


@dataclass
class Device:
    """A host and a device that runs what is queued in order. `now`: the host's clock; `free`: when the device is.
    depth: launches that can be queued before the host has to wait for the oldest."""

    now: float = 0.0
    free: float = 0.0
    depth: int = 1024
    queued: list[float] = field(default_factory=list)
    holds: list[float] = field(default_factory=list)

    def launch(self, host: float, device: float) -> None:
        self.now += host
        self.queued = [t for t in self.queued if t > self.now]
        if len(self.queued) >= self.depth:
            self.now = self.queued[0]
        self.free = max(self.free, self.now) + device
        self.queued.append(self.free)

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def hold(self, seconds: float) -> None:
        self.holds.append(seconds)
        self.launch(0.0, seconds)

    def record(self) -> float:
        return max(self.free, self.now)

    def passed(self, event: float) -> bool:
        return event <= self.now

    def between(self, first: float, second: float) -> float:
        self.now = max(self.now, second)
        return second - first

    def measure(self, *calls: Callable[[object], object], flush: Callable[[], object] | None = None) -> list[Timed]:
        bursts = [Burst(call, [None]) for call in calls]
        return interleave(bursts, CPU, seconds=0.2, flush=flush, clock=lambda: self.now, stream=self)


def test_a_short_kernel_behind_long_host_code() -> None:
    """10 us of the device and 400 of the host: both are found, where events around calls as they come show the host."""
    device = Device()
    ours, rival = device.measure(lambda _: device.launch(400e-6, 10e-6), lambda _: device.launch(95e-6, 20e-6))
    assert ours.median == pytest.approx(10e-6)
    assert ours.host == pytest.approx(400e-6)
    assert ours.calls == round(BURST_SECONDS / 10e-6)
    assert (rival.median, rival.host) == (pytest.approx(20e-6), pytest.approx(95e-6))
    assert not ours.waits
    assert len(ours.hosts) == len(ours.samples) >= 5


def test_a_long_kernel_takes_one_call_and_a_short_hold() -> None:
    device = Device()
    (timed,) = device.measure(lambda _: device.launch(50e-6, 2e-3))
    assert (timed.median, timed.host, timed.calls) == (pytest.approx(2e-3), pytest.approx(50e-6), 1)
    assert max(device.holds) < 1e-3


def test_a_call_that_waits_is_timed_with_its_host_code() -> None:
    device = Device()

    def call(_: object) -> None:
        device.launch(100e-6, 20e-6)
        device.synchronize()

    (timed,) = device.measure(call)
    assert timed.waits
    assert timed.host is None
    assert timed.median == pytest.approx(120e-6, rel=0.2)  # the first event may pass while the host begins
    count = len(device.holds)
    assert count <= 2 * held.TRIES, "it is not tried again in every round"


def test_a_host_that_becomes_slower_is_held_longer() -> None:
    device, calls = Device(), [0]

    def call(_: object) -> None:
        calls[0] += 1
        device.launch(4e-3 if calls[0] > 200 else 100e-6, 30e-6)

    (timed,) = device.measure(call)
    assert timed.samples == pytest.approx([30e-6] * len(timed.samples))
    assert not timed.waits


def test_more_launches_than_can_be_queued() -> None:
    """One call of so many waits by itself; many calls are limited to what can be queued by the length of a burst."""
    device = Device(depth=64)

    def call(_: object) -> None:
        for _ in range(100):
            device.launch(1e-6, 2e-6)

    (timed,) = device.measure(call)
    assert timed.waits
    assert timed.median == pytest.approx(200e-6, rel=0.02)
    (timed,) = device.measure(lambda _: device.launch(5e-6, 0.5e-6))
    assert timed.waits
    assert 1 < timed.calls <= MAX_CALLS


def test_no_hold_is_endless() -> None:
    device = Device()
    (timed,) = device.measure(lambda _: device.launch(30e-3, 1e-6))
    assert timed.median == pytest.approx(1e-6)
    assert timed.calls == 1, "as many as the host can issue in time"
    assert max(device.holds) <= LONGEST_HOLD


def test_a_flush_is_not_timed() -> None:
    device = Device()
    (timed,) = device.measure(lambda _: device.launch(50e-6, 8e-6), flush=lambda: device.launch(20e-6, 100e-6))
    assert (timed.median, timed.calls) == (pytest.approx(8e-6), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_device_behind_a_slow_host() -> None:
    import time

    x = torch.ones(1 << 20, device="cuda")

    def slow(_: object) -> None:
        time.sleep(500e-6)
        x.add_(1.0)

    def waiting(_: object) -> None:
        x.add_(1.0)
        torch.cuda.synchronize()

    device = torch.device("cuda")
    bursts = [Burst(run, [None]) for run in (slow, lambda _: x.add_(1.0), waiting)]
    late, early, waited = interleave(bursts, device, seconds=0.5)
    assert late.host is not None
    assert late.host >= 500e-6
    assert late.median < 100e-6
    assert late.median == pytest.approx(early.median, rel=0.5)
    assert waited.waits
    stream = CudaStream(device)
    held = []
    for _ in range(5):
        first = stream.record()
        stream.hold(5e-3)
        held.append(stream.between(first, stream.record()))
    # Other processes' kernels may run in between, so it can be longer; never shorter.
    assert 4e-3 < min(held) < 7.5e-3
