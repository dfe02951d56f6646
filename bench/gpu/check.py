"""The tests marked `gpu`, then the kernels against their targets and their rivals, in one run that ends in time.

    python bench/gpu_check.py --out bench/results/DATE-gpu.json

Exit status 1 where a test fails, a result is wrong or a target is missed; the last line says which.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.cli import pick_peers
from bench.jsonable import plain
from bench.limits import Limits
from bench.machine import ROOT, commit, describe
from bench.peers import slow_to_start
from bench.rows import Report, Row
from bench.suite import Options, plan_cache, run_case
from bench.table import seconds as readable
from bench.table import table
from bench.workloads import CASES, OPS

from .device_time import graph_seconds, kernel_seconds
from .targets import ALSO, TARGETS, Measure, Target

BACKENDS = ("triton", "cuda")
# Of the whole time, what the tests may take.
TEST_SHARE = 0.5
app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console(width=190)


@dataclass(frozen=True)
class Outcome:
    """failed: names of failed tests. error: why there is no result, or None."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    error: str | None = None


def run_tests(limit: float) -> Outcome:
    """`pytest -m gpu`, ended after `limit` seconds."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            return Outcome(0, 0, (), f"the tests did not end within {limit:.0f} s")
        if not report.exists():
            return Outcome(0, 0, (), f"pytest made no report: {(done.stdout + done.stderr)[-500:]}")
        return read_tests(report)


def read_tests(report: Path) -> Outcome:
    """What a JUnit report says. No test at all is an error: it would look like success."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    error = None if passed or failed else "no test ran"
    return Outcome(passed, skipped, tuple(failed), error)


def case_of(op: str, name: str) -> Any:
    return next(case for case in CASES[op] if case.name == name)


def measure(target: Target, rows: Sequence[Row], device: torch.device) -> float | None:
    """The figure that a target is about, or None where its row has no time (absent, wrong, not begun)."""
    found = [r for r in rows if (r.op, r.case, r.backend) == (target.op.removesuffix("_"), target.case, target.backend)]
    if not found or found[0].median_s is None:
        return None
    if target.measure is Measure.LIMIT:
        return found[0].fraction_of_limit
    if target.measure is Measure.CALL:
        return found[0].median_s
    case, options = case_of(target.op, target.case), Options(device, torch.bfloat16)
    workload = OPS[target.op](case, options.dtype, device, plan_cache(target.op, case, options).copies)

    def run(inputs: Any) -> object:
        return workload.ours(inputs, target.backend)

    if target.measure is Measure.DEVICE:
        return kernel_seconds(run, workload.inputs)
    if target.measure is Measure.GRAPH:
        return graph_seconds(run, workload.inputs[0])
    plain_inputs = [{**inputs, "rope": None} for inputs in workload.inputs]
    return kernel_seconds(run, workload.inputs) / kernel_seconds(run, plain_inputs)


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
    return f"{x:.3f}" if target.measure is Measure.ROPE else readable(x)


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


@app.command(help=__doc__)
def main(
    out: Annotated[Path | None, typer.Option(help="Write a JSON report here.")] = None,
    minutes: Annotated[float, typer.Option(help="The whole run ends in about this time.")] = 8.0,
    tests: Annotated[bool, typer.Option(help="Run the tests marked gpu first.")] = True,
    peers: Annotated[str, typer.Option(help="As for bench/run.py.")] = "auto",
) -> None:
    if not torch.cuda.is_available():
        raise typer.BadParameter("no CUDA device is visible: this check needs one")
    begin, device = time.monotonic(), torch.device("cuda")

    def left() -> float:
        return 60 * minutes - (time.monotonic() - begin)

    tested = run_tests(TEST_SHARE * 60 * minutes) if tests else Outcome(0, 0, (), "the tests were not run")
    console.print(
        f"tests: {tested.passed} passed, {tested.skipped} skipped, {len(tested.failed)} failed", highlight=False
    )
    present, absent = pick_peers(peers, device)
    report = Report(commit(), datetime.now(UTC).isoformat(timespec="seconds"), describe(device), {}, skipped=absent)
    limits = Limits(device, seconds=0.2)
    wanted = dict.fromkeys([(t.op, t.case) for t in TARGETS] + list(ALSO))
    for op, name in wanted:
        if left() < 20:
            console.print(f"no time left for {op} {name}", style="bold red")
            continue
        # A compiler takes as long as all the rest of a case: each op's first case has to do.
        first = (op, name) == next(one for one in wanted if one[0] == op)
        rivals = {n: module for n, module in present.items() if first or not slow_to_start(module)}
        report.rows += run_case(op, case_of(op, name), Options(device, torch.bfloat16, BACKENDS, 0.3), limits, rivals)
    measured, reasons = [], []
    for target in TARGETS:
        x, reason = measured_or_reason(target, report.rows, device) if left() > 5 else (None, None)
        measured.append((target, x))
        reasons += [reason] if reason else []
    report = replace(report, limits=limits.describe(), seconds=round(time.monotonic() - begin, 1))
    failures = verdicts(measured, tested, report.rows) + reasons
    console.print(table(report))
    console.print(target_table(measured))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = [{"target": t.name, "measured": x, "bound": t.bound, "met": t.met(x)} for t, x in measured]
        page = {"report": asdict(report), "tests": asdict(tested), "targets": found, "failures": failures}
        out.write_text(json.dumps(plain(page), indent=1, allow_nan=False) + "\n")
    console.print(last_line(failures), style="bold red" if failures else "bold", highlight=False)
    if failures:
        raise typer.Exit(1)
