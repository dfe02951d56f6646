"""The time that a GPU itself takes for a burst of calls, apart from the host's time to issue them.

A kernel of 10 us behind 300 us of host code is done long before the next call comes: events around calls as they come
measure the host. So a kernel that only spins holds the stream back until the host has queued the whole burst, and the
events stand behind it (NVBench's blocking kernel does the same). The device then runs call after call, and what the
host takes to issue a call is a figure of its own.

A call that waits for the device inside cannot be queued: the hold ends under it however long it is. Such a burst is
timed without a hold, host code included, which is what the call takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

# A hold is that many times what the host took last, and some more. Where the host was slower the burst is tried again
# with a longer one, so often at most; no hold is longer than this many seconds.
MARGIN, LEAST_HOLD, LONGEST_HOLD, TRIES = 1.5, 200e-6, 100e-3, 5
CALIBRATION_CYCLES = 2_000_000


class Stream(Protocol):
    """What is asked of a stream; events are whatever `record` gives."""

    def synchronize(self) -> None:
        """Wait until nothing is under way."""

    def hold(self, seconds: float) -> None:
        """Queue about so long a spin."""

    def record(self) -> Any:
        """Queue an event."""

    def passed(self, event: Any) -> bool:
        """Has the device come to it? Does not wait."""

    def between(self, first: Any, second: Any) -> float:
        """Seconds from one event to another; waits for that."""


class CudaStream:
    """The current stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cycles = device, 0.0
        for _ in range(2):  # the first loads the kernel
            first = self.record()
            self._spin(CALIBRATION_CYCLES)
            self.cycles = CALIBRATION_CYCLES / self.between(first, self.record())  # a second

    def _spin(self, cycles: int) -> None:
        with torch.cuda.device(self.device):
            torch.cuda._sleep(cycles)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def hold(self, seconds: float) -> None:
        self._spin(round(seconds * self.cycles))

    def record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def passed(self, event: torch.cuda.Event) -> bool:
        return bool(event.query())

    def between(self, first: torch.cuda.Event, second: torch.cuda.Event) -> float:
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


@dataclass
class Hold:
    """How long the stream is held for one burst. waits: it cannot be queued behind a hold, and is timed without."""

    seconds: float = LEAST_HOLD
    waits: bool = False


def timed(
    burst: Callable[[], object], hold: Hold, stream: Stream, clock: Callable[[], float]
) -> tuple[float, float | None]:
    """Seconds of a burst on the device, and of the host to issue it; where it waits those of both, and None. Makes the
    hold what the host needed."""
    for _ in range(TRIES):
        if hold.waits:
            break
        seconds, host, held = _behind(burst, hold.seconds, stream, clock)
        if held:
            hold.seconds = min(LONGEST_HOLD, max(0.9 * hold.seconds, MARGIN * host + LEAST_HOLD))
            return seconds, host
        if hold.seconds == LONGEST_HOLD:
            break
        hold.seconds = min(LONGEST_HOLD, max(2 * hold.seconds, MARGIN * host + LEAST_HOLD))
    hold.waits = True
    return _behind(burst, 0.0, stream, clock)[0], None


def _behind(
    burst: Callable[[], object], hold: float, stream: Stream, clock: Callable[[], float]
) -> tuple[float, float, bool]:
    """Seconds between the events, seconds of the host, and whether all was queued when the hold ended."""
    stream.synchronize()
    if hold:
        stream.hold(hold)
    start, begin = stream.record(), clock()
    burst()
    host = clock() - begin
    end = stream.record()
    held = not stream.passed(start)
    return stream.between(start, end), host, held
