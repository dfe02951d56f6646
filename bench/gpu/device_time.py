"""Times of a call that a row does not show: from an idle device to an idle device, what its kernels take, and a replay
of its CUDA graph."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUNDS = 20


def call_seconds(run: Callable[[Any], object], states: Sequence[Any]) -> float:
    """Median wall time of a call on an idle device until its results are there: host code and kernels."""
    samples = []
    for i in range(3 + ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(states[i % len(states)])
        torch.cuda.synchronize()
        samples.append(time.perf_counter() - begin)
    return statistics.median(samples[3:])


def kernel_seconds(run: Callable[[Any], object], states: Sequence[Any]) -> float:
    """Median over calls of the sum of the durations of the kernels and copies that one call launches."""
    from torch.profiler import ProfilerActivity, profile

    for state in states[:3]:
        run(state)
    torch.cuda.synchronize()
    totals = []
    for i in range(ROUNDS):
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            run(states[i % len(states)])
            torch.cuda.synchronize()
        totals.append(sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6)
    return statistics.median(totals)


def graph_seconds(run: Callable[[Any], object], state: Any) -> float:
    """Median time of a replay; raises what the capture raises where the call cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(state)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / 1e4)
    return statistics.median(samples)
