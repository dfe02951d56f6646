"""The tests marked `gpu`, then the kernels against their targets and their rivals, in one run that ends in time.

    python bench/gpu_check.py --out bench/results/DATE-gpu.json

Exit status 1 where a test fails, a result is wrong or a target is missed; the last line says which.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
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
from bench.table import host, table
from bench.table import seconds as readable
from bench.workloads import CASES, OPS
from mc_kernels.preference import BACKENDS, FILE

from . import preference
from .budget import Budget
from .device_time import call_seconds, graph_seconds, kernel_seconds
from .junit import Outcome, run_tests
from .sanitize import sanitize
from .targets import ALSO, TARGETS, Measure, Target

DTYPE = torch.bfloat16
# Of timing per candidate.
SECONDS = 0.3
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
    case, options = case_of(target.op, target.case), Options(device, DTYPE)
    workload = OPS[target.op](case, options.dtype, device, plan_cache(target.op, case, options).copies)

    def run(inputs: Any) -> object:
        return workload.ours(inputs, target.backend)

    if target.measure is Measure.CALL:
        return call_seconds(run, workload.inputs)
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


def verdicts(measured: Sequence[tuple[Target, float | None]], tests: Outcome | None, rows: Sequence[Row]) -> list[str]:
    """What failed, one line each; empty: nothing did. tests: None where they were not asked for."""
    out = [f"test {name}" for name in tests.failed] if tests else []
    out += [tests.error] if tests and tests.error else []
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


def last_line(failures: Sequence[str], tests: Outcome | None) -> str:
    if failures:
        return f"FAILED ({len(failures)}): {'; '.join(failures)}"
    return f"{'Everything passed' if tests else 'The tests were not asked for'}, every target is met."


def in_order(ops: Collection[str] = ()) -> list[tuple[str, str]]:
    """The cases of targets and of `ALSO`, or those of some ops: the smallest of each op first, so that every op has a
    row, then the others, the largest last."""
    wanted = dict.fromkeys([(t.op, t.case) for t in TARGETS] + list(ALSO))
    by_size = sorted(
        (pair for pair in wanted if not ops or pair[0] in ops),
        key=lambda pair: OPS[pair[0]].touched(case_of(*pair), DTYPE),
    )
    first = {op: (op, name) for op, name in reversed(by_size)}
    return sorted(by_size, key=lambda pair: first[pair[0]] != pair)


def run_cases(
    device: torch.device, budget: Budget, limits: Limits, peers: dict[str, ModuleType], keys: preference.Keys,
    ops: Collection[str] = (), seconds: float = SECONDS,
) -> list[Row]:  # fmt: skip
    """Rows of the cases, as far as the time goes; what is found is printed at once. Adds to `keys` what serves each is
    looked up by. seconds: of timing per candidate."""
    rows: list[Row] = []
    longest = 0.0
    begun: set[str] = set()
    for op, name in in_order(ops):
        if budget.left("cases") < longest:
            console.print(f"no time left for {op} {name}", style="bold red")
            continue
        # A compiler takes as long as all the rest of a case: each op's first case has to do, and while there is time.
        slow = op not in begun and budget.left("cases") > budget.share("cases") / 2
        rivals = {n: module for n, module in peers.items() if slow or not slow_to_start(module)}
        options = Options(device, DTYPE, BACKENDS, seconds)
        begin = budget.spent
        found = run_case(op, case_of(op, name), options, limits, rivals, begun=lambda x: preference.note_key(x, keys))
        console.print(f"{budget.spent:.0f} s: {op} {name}: {', '.join(map(summary, found))}", highlight=False)
        rows += found
        if not slow:
            longest = max(longest, budget.spent - begin)
        begun.add(op)
    return rows


def summary(row: Row) -> str:
    """A row in few words, for those who watch."""
    if row.median_s is None:
        return f"{row.backend} {'WRONG' if row.correct is False else 'absent'}"
    return f"{row.backend} {readable(row.median_s)}{f' (host {host(row)})' if host(row) else ''}"


@app.command(help=__doc__)
def main(
    out: Annotated[Path | None, typer.Option(help="Write a JSON report here.")] = None,
    minutes: Annotated[float, typer.Option(help="The whole run ends in about this time.")] = 8.0,
    tests: Annotated[bool, typer.Option(help="Run the tests marked gpu first.")] = True,
    peers: Annotated[str, typer.Option(help="As for bench/run.py.")] = "auto",
    write_preference: Annotated[
        bool, typer.Option("--write-preference", help="Let the faster backend serve: write mc_kernels/preference.json.")
    ] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only this op's cases and targets.")] = None,
    seconds: Annotated[float, typer.Option(help="Seconds of timing per candidate.")] = SECONDS,
    sanitized: Annotated[
        bool,
        typer.Option(
            "--sanitize", help="Then the tests of the CUDA kernels under compute-sanitizer, for up to as long again."
        ),
    ] = False,
) -> None:
    ops = [name if name in OPS else f"{name}_" for name in op or ()]
    if unknown := [name for name in ops if name not in OPS]:
        raise typer.BadParameter(f"--op: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible: this check needs one")
    budget, device = Budget(60 * minutes), torch.device("cuda")
    tested = None
    if tests:
        tested = run_tests(budget.left("tests"), processes=min(os.cpu_count() or 1, MOST_PROCESSES))
        counts = f"{tested.passed} passed, {tested.skipped} skipped, {len(tested.failed)} failed"
        console.print(f"{budget.spent:.0f} s: tests: {counts}", highlight=False)
    present, absent = pick_peers(peers, device)
    report = Report(commit(), datetime.now(UTC).isoformat(timespec="seconds"), describe(device), {}, skipped=absent)
    limits = Limits(device, seconds=0.2)
    console.print(f"{budget.spent:.0f} s: the machine's limits are measured", highlight=False)
    keys: preference.Keys = {}
    report.rows = run_cases(device, budget, limits, present, keys, ops, seconds)
    report.limits, report.seconds = limits.describe(), round(budget.spent, 1)
    console.print(table(report))
    if write_preference:
        count = preference.save(FILE, report, keys)
        console.print(f"{FILE}: {count} buckets" if count else f"{FILE} stays: no two backends were measured")
    save(out, report, tested, [], verdicts([], tested, report.rows))  # kept, whatever becomes of what follows
    measured, reasons = [], []
    for target in TARGETS:
        if ops and target.op not in ops:
            continue
        late = budget.left("targets") < TARGET_SECONDS
        x, reason = (None, None) if late else measured_or_reason(target, report.rows, device)
        measured.append((target, x))
        reasons += [reason] if reason else []
    report.seconds = round(budget.spent, 1)
    failures = verdicts(measured, tested, report.rows) + reasons
    console.print(target_table(measured))
    failures += sanitize(60 * minutes) if sanitized else []
    save(out, report, tested, measured, failures)
    console.print(last_line(failures, tested), style="bold red" if failures else "bold", highlight=False)
    if failures:
        raise typer.Exit(1)


def save(
    out: Path | None, report: Report, tests: Outcome | None, measured: Sequence[tuple[Target, float | None]],
    failures: Sequence[str],
) -> None:  # fmt: skip
    """Write everything of a run as JSON; nothing without a file to write."""
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    found = [{"target": t.name, "measured": x, "bound": t.bound, "met": t.met(x)} for t, x in measured]
    page = {
        "report": asdict(report), "tests": asdict(tests) if tests else None, "targets": found, "failures": failures,
    }  # fmt: skip
    out.write_text(json.dumps(plain(page), indent=1, allow_nan=False) + "\n")
