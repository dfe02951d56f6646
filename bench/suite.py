"""Run the candidates of one case: check each against the oracle, time those that are right in alternation."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from mc_kernels import BackendError

from .limits import Limits, flusher
from .machine import available_memory, last_level_cache
from .rows import Row
from .timing import Burst, Clock, Timed, interleave, ratio
from .workloads import OPS, Candidate, Workload
from .workloads.base import PEER_ALLOWANCE

# Rotating inputs are together so many times the largest cache: the first that ROTATION_BYTES have room for. (Of a
# cache of hundreds of MB, which a virtual machine shares with others, twice is as cold as four times.)
ROTATIONS = (4, 2)
ROTATION_BYTES = 1 << 30
# Inputs, those of a rival with a layout of its own, and the temporaries of one that works out of place.
WORKING_COPIES = 4


@dataclass(frozen=True)
class Options:
    """What holds for every case of a run.

    seconds: of timing per candidate, by `clock`. warm: time on one set of inputs that stays in the cache, where it
    fits.
    """

    device: torch.device
    dtype: torch.dtype
    backends: Sequence[str] = ()
    seconds: float = 0.5
    warm: bool = False
    clock: Clock | None = None


@dataclass(frozen=True)
class CachePlan:
    """How inputs are kept out of the cache: `copies` sets in rotation, or one set and a flush before every call."""

    copies: int
    flush: bool
    label: str


def plan_cache(op: str, case: Any, options: Options) -> CachePlan:
    if options.warm:
        return CachePlan(1, False, "warm")
    cache = last_level_cache(options.device)
    held, moved = OPS[op].touched(case, options.dtype), case.bytes(options.dtype)
    if moved >= ROTATIONS[0] * cache:
        return CachePlan(1, False, "cold (large)")
    for times in ROTATIONS:
        copies = math.ceil(times * cache / max(1, moved))
        if copies * held <= ROTATION_BYTES:
            return CachePlan(copies, False, f"cold ({copies} sets)")
    return CachePlan(1, True, "cold (flush)")


def _candidates(
    workload: Workload, options: Options, peers: Mapping[str, ModuleType]
) -> list[tuple[Candidate, str | None]]:
    """Every candidate with the reason why it cannot run, or None."""
    found: list[tuple[Candidate, str | None]] = []
    for name, candidate in workload.backends(options.backends):
        if isinstance(candidate, str):
            found.append((Candidate(name, lambda _: None, peer=False), candidate))
        else:
            found.append((candidate, None))
    for name, module in peers.items():
        if workload.rivals is not None and name not in workload.rivals:
            continue
        try:
            found += [(candidate, None) for candidate in module.offers(workload)]
        except Exception as error:  # as with what a candidate raises: the table shows it
            found.append((Candidate(name, lambda _: None), f"{type(error).__name__}: {error}".splitlines()[0][:200]))
    return found


def lacking_memory(op: str, case: Any, options: Options, copies: int) -> str | None:
    """Why a case is not begun: its inputs and what rivals make of them would not fit."""
    needed, free = WORKING_COPIES * copies * OPS[op].touched(case, options.dtype), available_memory(options.device)
    if free is None or needed <= free:
        return None
    return f"needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def run_case(
    op: str,
    case: Any,
    options: Options,
    limits: Limits,
    peers: Mapping[str, ModuleType],
    progress: Callable[[str], None] = lambda _: None,
    begun: Callable[[Workload], object] = lambda _: None,
) -> list[Row]:
    """Rows of all candidates on a case, ours first. A candidate that raises or is wrong gets its error, not a time.

    begun: called with the workload before anything of it runs.
    """
    cache = plan_cache(op, case, options)
    blank = Row(
        op.removesuffix("_"), case.name, "all", str(options.device), str(options.dtype).removeprefix("torch."),
        case.bytes(options.dtype), case.flops(), cache=cache.label,
    )  # fmt: skip
    if (reason := lacking_memory(op, case, options, cache.copies)) is not None:
        return [replace(blank, error=reason)]
    workload = OPS[op](case, options.dtype, options.device, cache.copies)
    begun(workload)
    rows: list[Row] = []
    running: list[tuple[int, Candidate]] = []
    for candidate, absent in _candidates(workload, options, peers):
        row = replace(
            blank, backend=candidate.name, is_peer=candidate.peer, note=candidate.note, same_work=candidate.same_work
        )
        if absent is not None:
            rows.append(replace(row, error=f"not available: {absent}"))
            continue
        progress(f"{row.op} {case.name}: checking {candidate.name}")
        try:
            check = workload.check(candidate)
        except BackendError as error:  # a refusal: a backend need not take every case
            rows.append(replace(row, error=f"not available: {error}"))
            continue
        except Exception as error:  # the table shows it; one broken candidate must not end the run
            rows.append(replace(row, correct=False, error=f"{type(error).__name__}: {error}".splitlines()[0][:200]))
            continue
        reason = check.reason(PEER_ALLOWANCE if candidate.peer else 1.0)
        rows.append(replace(row, correct=reason is None, max_error=check.error, error=reason))
        if reason is None:
            running.append((len(rows) - 1, candidate))
    progress(f"{blank.op} {case.name}: timing")
    measured = _time(workload, [c for _, c in running], options, limits, cache)
    for at, _ in running:
        rows[at] = replace(rows[at], **measured.figures(rows[at].backend))
    return _with_best_peer(rows, measured.timed)


@dataclass(frozen=True)
class Measured:
    """What was timed, by candidate, and the limit's time in the same rounds.

    slower: the limit's time with the matrix rate at the case's row count over that with the large product's.
    """

    timed: Mapping[str, Timed]
    limit: Sequence[float]
    slower: float

    def figures(self, name: str) -> dict[str, Any]:
        t = self.timed[name]
        fraction = statistics.median(l / s for l, s in zip(self.limit, t.samples, strict=True))
        return {
            "median_s": t.median, "spread": t.spread, "runs": len(t.samples) * t.calls, "host_s": t.host,
            "waits": t.waits,
            "limit_s": statistics.median(self.limit), "fraction_of_limit": fraction,
            "fraction_at_rows": fraction * self.slower,
        }  # fmt: skip


def _time(
    workload: Workload, candidates: Sequence[Candidate], options: Options, limits: Limits, cache: CachePlan
) -> Measured:
    if not candidates:
        return Measured({}, [], 1.0)
    device, traffic, flops = options.device, workload.bytes, workload.flops
    probes = limits.probes(workload.limit, traffic, flops, options.dtype)
    # Each begins elsewhere among the sets: what one has just read would be warm for the next.
    n = len(workload.inputs)
    bursts = [
        Burst(c.run, [c.prepare(x) for x in workload.inputs], i * n // len(candidates))
        for i, c in enumerate(candidates)
    ]
    flush = flusher(device, last_level_cache(device)) if cache.flush else None
    all_bursts = [p.burst() for p in probes] + bursts
    seconds = options.seconds * len(all_bursts)
    timed = interleave(all_bursts, device, seconds=seconds, flush=flush, clock=options.clock)
    limit = limits.per_round(probes, timed[: len(probes)], traffic, flops)
    slower = 1.0
    if len(probes) > 1 and workload.rows is not None:
        slower = max(1.0, flops / limits.matrix_rate(options.dtype, workload.rows) / statistics.median(limit))
    return Measured(dict(zip((c.name for c in candidates), timed[len(probes) :], strict=True)), limit, slower)


def _with_best_peer(rows: list[Row], timed: Mapping[str, Timed]) -> list[Row]:
    rivals = [row for row in rows if row.is_peer and row.same_work and row.median_s is not None]
    if not rivals:
        return rows
    best = min(rivals, key=lambda row: row.median_s or math.inf).backend
    return [
        row
        if row.is_peer or row.median_s is None
        else replace(row, peer=best, peer_ratio=ratio(timed[best], timed[row.backend]))
        for row in rows
    ]
