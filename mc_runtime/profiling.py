"""Named ranges: for NVIDIA Nsight and compatible profilers (through the package `nvtx`, where it is installed), in the
trace of a running torch profiler, and for whoever collects their times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

try:
    import nvtx
except ImportError:  # the extra `profile` is optional
    nvtx = None

_collected: list[dict[str, list[float]]] = []


class _Open(threading.local):
    """Names of the ranges that a thread is in."""

    def __init__(self) -> None:
        self.names: list[str] = []


_open = _Open()


class Timer:
    """Seconds spent in a `timed` range, readable after it ends."""

    seconds: float = 0.0


@contextmanager
def timed(name: str) -> Iterator[Timer]:
    """A range that also measures wall-clock time. Some 2 microseconds without a profiler."""
    timer = Timer()
    handle = nvtx.start_range(message=name, domain="megacontext") if nvtx is not None else None
    trace = torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else nullcontext()
    _open.names.append(name)
    start = time.perf_counter()
    try:
        with trace:
            yield timer
    finally:
        timer.seconds = time.perf_counter() - start
        if handle is not None:
            nvtx.end_range(handle)
        for times in _collected:
            times.setdefault("/".join(_open.names), []).append(timer.seconds)
        _open.names.pop()


@contextmanager
def collect_ranges() -> Iterator[dict[str, list[float]]]:
    """Ranges that end inside the block: seconds of each, in order, by its name behind those of the ranges around it
    ("refocus/score")."""
    times: dict[str, list[float]] = {}
    _collected.append(times)
    try:
        yield times
    finally:
        _collected[:] = [other for other in _collected if other is not times]
