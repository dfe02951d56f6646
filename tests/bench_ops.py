"""The ops under pytest-benchmark: `pytest tests/bench_ops.py` (options: `--benchmark-help`, `-k`, MC_BENCH_DTYPE).

Not part of the test suite: its name is none that pytest collects by itself. Every available backend on the cases of a
plain `bench/run.py`; a result is checked against the oracle before it is timed. For limits, rivals and interleaved
timing use `bench/run.py`; this is for those whose tools read pytest-benchmark's files.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# `bench` is no installed package.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.dtypes import DTYPES
from bench.limits import flusher
from bench.machine import last_level_cache
from bench.suite import CachePlan, Options, plan_cache
from bench.workloads import CASES, HEADLINE, OPS, Candidate, Workload
from mc_kernels.registry import IMPLS, PREFERENCE

DTYPE = DTYPES[os.environ.get("MC_BENCH_DTYPE", "bf16")]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Rounds where every call is preceded by a flush, so that pytest-benchmark cannot choose their number.
FLUSHED_ROUNDS = 20


def _parameters() -> Iterator[Any]:
    for op in OPS:
        by_name = {case.name: case for case in CASES[op]}
        for name in HEADLINE[op]:
            for backend, impl in IMPLS[op].items():
                if backend not in PREFERENCE[DEVICE.type]:
                    continue
                reason = impl.available()
                marks = [pytest.mark.skip(reason=f"{backend}: {reason}")] if reason is not None else []
                ident = f"{op.removesuffix('_')}-{name}-{backend}"
                yield pytest.param(op, by_name[name], backend, id=ident, marks=marks)


# One case at a time: inputs that exceed the cache together are large.
_made: dict[tuple[str, str], tuple[Workload, CachePlan]] = {}


def _workload(op: str, case: Any) -> tuple[Workload, CachePlan]:
    """Inputs are shared by the backends of a case, which come one after the other."""
    key = op, case.name
    if key not in _made:
        _made.clear()
        plan = plan_cache(op, case, Options(DEVICE, DTYPE))
        _made[key] = OPS[op](case, DTYPE, DEVICE, plan.copies), plan
    return _made[key]


@pytest.mark.benchmark(min_rounds=5, max_time=0.5, warmup=False)
@pytest.mark.parametrize(("op", "case", "backend"), list(_parameters()))
def test_op(benchmark: Any, op: str, case: Any, backend: str) -> None:
    workload, plan = _workload(op, case)
    candidate: Candidate = workload.backend(backend)
    reason = workload.check(candidate).reason()
    assert reason is None, reason
    states = itertools.cycle([candidate.prepare(inputs) for inputs in workload.inputs])
    benchmark.group = f"{op.removesuffix('_')} {case.name}"
    benchmark.extra_info |= {
        "dtype": str(DTYPE).removeprefix("torch."), "device": str(DEVICE), "cache": plan.label,
        "bytes": workload.bytes, "flops": workload.flops,
    }  # fmt: skip

    def run() -> None:
        candidate.run(next(states))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    if plan.flush:
        flush = flusher(DEVICE, last_level_cache(DEVICE))

        def setup() -> None:
            flush()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(run, setup=setup, rounds=FLUSHED_ROUNDS, warmup_rounds=1)
        return
    benchmark(run)
