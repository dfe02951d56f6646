"""One turn under the torch profiler: a trace for Perfetto with our named ranges, and what they add up to.

The same ranges are NVTX ranges in the domain `megacontext` where the package `nvtx` is installed, for Nsight Systems:
`nsys profile -t nvtx,cuda python bench/run.py e2e --quick --profile DIR`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.e2e.history import QUESTIONS
from mc_runtime import Session
from mc_runtime.profiling import collect_ranges

FILE = "turn.json"


@dataclass(frozen=True)
class Range:
    """All ranges, or calls of a torch operator, of one name. seconds: together; longest: of one."""

    name: str
    count: int
    seconds: float
    longest: float


def profile_turn(session: Session, directory: Path, most: int = 10) -> tuple[list[Range], list[Range], Path]:
    """Ask one question and decode past a refocus. Returns our ranges (a range contains those inside it), the operators
    by their own time, `most` of each, longest first, and the trace."""
    directory.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    tokens = session.config.block_size + 4
    with profile(activities=activities) as profiler, collect_ranges() as times:
        session.generate(QUESTIONS[0], max_new_tokens=tokens, temperature=1.0, seed=0)
    path = directory / FILE
    profiler.export_chrome_trace(str(path))
    ranges = [Range(name, len(seconds), sum(seconds), max(seconds)) for name, seconds in times.items()]
    named = {part for name in times for part in name.split("/")}
    operators = [
        Range(event.key, event.count, event.self_cpu_time_total * 1e-6, event.cpu_time * 1e-6)
        for event in profiler.key_averages()
        if event.key not in named
    ]
    return _longest(ranges, most), _longest(operators, most), path


def _longest(ranges: list[Range], most: int) -> list[Range]:
    return sorted(ranges, key=lambda one: -one.seconds)[:most]
