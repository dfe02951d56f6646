"""The tests marked `gpu`, then the kernels against their targets and their rivals, in one run that ends in time.

    python bench/gpu_check.py --out bench/results/DATE-gpu.json

Exit status 1 where a test fails, a result is wrong or a target is missed; the last line says which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.cli import pick_peers
from bench.jsonable import plain
from bench.limits import Limits
from bench.machine import commit, describe
from bench.peers import slow_to_start
from bench.rows import Report, Row
from bench.suite import Options, plan_cache, run_case
from bench.table import seconds as readable
from bench.table import table
from bench.workloads import CASES, OPS
from mc_kernels.preference import BACKENDS, FILE

from . import preference
from .budget import Budget
from .device_time import graph_seconds, kernel_seconds
from .junit import Outcome, run_tests
from .sanitize import sanitize
from .targets import ALSO, TARGETS, Measure, Target

DTYPE = torch.bfloat16
# A target is measured in some seconds.
TARGET_SECONDS = 5.0
# That share the tests, and the device: each has a context of its own, half a gigabyte.
MOST_PROCESSES = 16
app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console(width=190)


def case_of(op: str, name: str) -> Any:
    return next(case for case in CASES[op] if case.name == name)


def measure(target: Target, rows: Sequence[Row], device: torch.device) -> float | None:
    """The figure that a target is about, or None where its row has no time (absent, wrong, not begun)."""
    found = [r for r in rows if (r.op, r.case, r.backend) == (target.op.removesuffix("_"), target.case, target.backend)]
    if not found or found[0].median_s is None or found[0].limit_s is None:
        return None
    if target.measure is Measure.LIMIT:
        return found[0].fraction_of_limit
    if target.measure is Measure.CALL:
        return found[0].median_s
    case, options = case_of(target.op, target.case), Options(device, DTYPE)
    workload = OPS[target.op](case, options.dtype, device, plan_cache(target.op, case, options).copies)

    def run(inputs: Any) -> object:
        return workload.ours(inputs, target.backend)

    if target.measure is Measure.GRAPH:
        return graph_seconds(run, workload.inputs[0])
    kernels = kernel_seconds(run, workload.inputs)
    if target.measure is Measure.DEVICE:
        return kernels
    if target.measure is Measure.TIMES:
        return kernels / found[0].limit_s
    return kernels / kernel_seconds(run, [{**inputs, "rope": None} for inputs in workload.inputs])


def measured_or_reason(target: Target, rows: Sequence[Row], device: torch.device) -> tuple[float | None, str | None]:
    """The figure, or why there is none: a call that cannot be captured, say, must not end the run."""
    try:
        return measure(target, rows, device), None
    except Exception as error:  # the last line shows it
        return None, f"{target.name}: {type(error).__name__}: {error}".splitlines()[0][:200]


def verdicts(measured: Sequence[tuple[Target, float | None]], tests: Outcome, rows: Sequence[Row]) -> list[str]:
    """What failed, one line each; empty: nothing did."""
    out = [f"test {name}" for name in tests.failed]
    out += [tests.error] if tests.error else []
    out += [f"{r.op} {r.case} ({r.backend}): {r.error}" for r in rows if r.correct is False and not r.is_peer]
    out += [f"{t.name}: {shown(t, x)}, target {shown(t, t.bound)}" for t, x in measured if not t.met(x)]
    return out


def shown(target: Target, x: float | None) -> str:
    if x is None:
        return "not measured"
    if target.measure is Measure.LIMIT:
        return f"{x:.0%}"
    return f"{x:.3f}" if target.measure in (Measure.ROPE, Measure.TIMES) else readable(x)


def target_table(measured: Sequence[tuple[Target, float | None]]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("target", "measured", "bound", ""):
        out.add_column(name)
    for target, x in measured:
        verdict = "met" if target.met(x) else "MISSED"
        out.add_row(target.name, shown(target, x), shown(target, target.bound), verdict)
    return out


def last_line(failures: Sequence[str]) -> str:
    return f"FAILED ({len(failures)}): {'; '.join(failures)}" if failures else "Everything passed, every target is met."


def run_cases(
    device: torch.device, budget: Budget, limits: Limits, peers: dict[str, ModuleType], keys: preference.Keys
) -> list[Row]:
    """Rows of the cases of targets and of `ALSO`, as far as the time goes. Adds to `keys` what serves each is looked up
    by."""
    rows: list[Row] = []
    longest = 0.0
    begun: set[str] = set()
    for op, name in dict.fromkeys([(t.op, t.case) for t in TARGETS] + list(ALSO)):
        if budget.left("cases") < longest:
            console.print(f"no time left for {op} {name}", style="bold red")
            continue
        # A compiler takes as long as all the rest of a case: each op's first case has to do, and while there is time.
        slow = op not in begun and budget.left("cases") > budget.share("cases") / 2
        rivals = {n: module for n, module in peers.items() if slow or not slow_to_start(module)}
        options = Options(device, DTYPE, BACKENDS, 0.3)
        begin = budget.spent
        rows += run_case(op, case_of(op, name), options, limits, rivals, begun=lambda x: preference.note_key(x, keys))
        if not slow:
            longest = max(longest, budget.spent - begin)
        begun.add(op)
    return rows


@app.command(help=__doc__)
def main(
    out: Annotated[Path | None, typer.Option(help="Write a JSON report here.")] = None,
    minutes: Annotated[float, typer.Option(help="The whole run ends in about this time.")] = 8.0,
    tests: Annotated[bool, typer.Option(help="Run the tests marked gpu first.")] = True,
    peers: Annotated[str, typer.Option(help="As for bench/run.py.")] = "auto",
    write_preference: Annotated[
        bool, typer.Option("--write-preference", help="Let the faster backend serve: write mc_kernels/preference.json.")
    ] = False,
    sanitized: Annotated[
        bool,
        typer.Option(
            "--sanitize", help="Then the tests of the CUDA kernels under compute-sanitizer, for up to as long again."
        ),
    ] = False,
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible: this check needs one")
    budget, device = Budget(60 * minutes), torch.device("cuda")
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    tested = Outcome(0, 0, (), "the tests were not run")
    if tests:
        tested = run_tests(budget.left("tests"), processes=processes)
    console.print(
        f"tests: {tested.passed} passed, {tested.skipped} skipped, {len(tested.failed)} failed", highlight=False
    )
    present, absent = pick_peers(peers, device)
    report = Report(commit(), datetime.now(UTC).isoformat(timespec="seconds"), describe(device), {}, skipped=absent)
    limits = Limits(device, seconds=0.2)
    keys: preference.Keys = {}
    report.rows = run_cases(device, budget, limits, present, keys)
    measured, reasons = [], []
    for target in TARGETS:
        late = budget.left("targets") < TARGET_SECONDS
        x, reason = (None, None) if late else measured_or_reason(target, report.rows, device)
        measured.append((target, x))
        reasons += [reason] if reason else []
    report.limits, report.seconds = limits.describe(), round(budget.spent, 1)
    failures = verdicts(measured, tested, report.rows) + reasons
    console.print(table(report))
    console.print(target_table(measured))
    if write_preference:
        count = preference.save(FILE, report, keys)
        console.print(f"{FILE}: {count} buckets" if count else f"{FILE} stays: no two backends were measured")
    failures += sanitize(60 * minutes) if sanitized else []
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = [{"target": t.name, "measured": x, "bound": t.bound, "met": t.met(x)} for t, x in measured]
        page = {"report": asdict(report), "tests": asdict(tested), "targets": found, "failures": failures}
        out.write_text(json.dumps(plain(page), indent=1, allow_nan=False) + "\n")
    console.print(last_line(failures), style="bold red" if failures else "bold", highlight=False)
    if failures:
        raise typer.Exit(1)
