"""Named ranges for NVIDIA Nsight and compatible profilers, through the package `nvtx`; nothing without it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

try:
    import nvtx
except ImportError:  # the extra `profile` is optional; ranges then cost two clock reads and nothing else
    nvtx = None


class Timer:
    """Seconds spent in a `timed` range, readable after it ends."""

    seconds: float = 0.0


@contextmanager
def timed(name: str) -> Iterator[Timer]:
    """An NVTX range in the domain `megacontext` that also measures wall-clock time."""
    timer = Timer()
    handle = nvtx.start_range(message=name, domain="megacontext") if nvtx is not None else None
    start = time.perf_counter()
    try:
        yield timer
    finally:
        timer.seconds = time.perf_counter() - start
        if handle is not None:
            nvtx.end_range(handle)
