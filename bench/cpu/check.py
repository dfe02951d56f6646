"""The CPU kernels against their targets, rivals and limits in one run: a line a target, and what is missed.

    python bench/cpu_check.py --out bench/results/DATE-targets-cpu.json
    python bench/cpu_check.py --busy     # beside other work: processor time of one thread

Exit status 1 where a result is wrong; a target that is missed says so and no more, since a busy machine misses some.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.cli import pick_peers
from bench.jsonable import plain
from bench.limits import Limits
from bench.machine import commit, describe
from bench.rows import Report, Row
from bench.suite import Options, run_case
from bench.table import limits_line
from bench.table import seconds as readable
from mc_kernels.registry import IMPLS

from .targets import OURS, TARGETS, Measure, Target, case_of, measure

app = typer.Typer(add_completion=False, rich_markup_mode=None)
console = Console(width=190)
CPU = torch.device("cpu")
RIVALS = "torch,torch.compile,SDPA,llama.cpp"


def jobs(targets: Sequence[Target]) -> dict[tuple[str, str, torch.dtype], set[str]]:
    """(op, case, dtype) of every row that the targets need, with the names of the rivals that they need it against."""
    out: dict[tuple[str, str, torch.dtype], set[str]] = {}
    for t in targets:
        rivals = out.setdefault((t.op, t.case, t.dtype), set())
        if t.measure in (Measure.FASTER, Measure.PER_BYTE):
            rivals.add(t.against)
        elif t.measure is Measure.SHARE:
            out.setdefault((t.op, t.against, t.dtype), set())
    return out


def offering(needed: set[str], present: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """The peers whose candidates are needed: a candidate's name begins with its peer's."""
    return {name: module for name, module in present.items() if any(n.split(",")[0] == name for n in needed)}


def shown(target: Target, x: float | None) -> str:
    if x is None:
        return "not measured"
    if target.measure in (Measure.FASTER, Measure.PER_BYTE):
        return f"{x:.2f}x"
    return f"{x:.1%}"


def time_of(target: Target, rows: Sequence[Row]) -> str:
    dtype = str(target.dtype).removeprefix("torch.")
    key = target.op.removesuffix("_"), target.case, OURS, dtype
    row = next((r for r in rows if (r.op, r.case, r.backend, r.dtype) == key), None)
    if row is None:
        return ""
    return readable(row.median_s) if row.median_s is not None else row.error or ""


def target_table(measured: Sequence[tuple[Target, float | None]], rows: Sequence[Row]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("target", "ours", "measured", "bound", ""):
        out.add_column(name)
    for target, x in measured:
        verdict = "" if x is None else "met" if target.met(x) else "MISSED"
        out.add_row(target.name, time_of(target, rows), shown(target, x), shown(target, target.bound), verdict)
    return out


@app.command(help=__doc__)
def main(
    op: Annotated[list[str] | None, typer.Option(help="Only the targets of this op.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only targets with this in their case's name.")] = None,
    peers: Annotated[str, typer.Option(help="As for bench/run.py.")] = RIVALS,
    seconds: Annotated[float, typer.Option(help="Seconds of timing per candidate.")] = 0.5,
    busy: Annotated[
        bool,
        typer.Option("--busy", help="One thread's processor time: other work on the machine changes it little."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write a JSON report here.")] = None,
) -> None:
    targets = [
        t for t in TARGETS
        if (not op or t.op.removesuffix("_") in op) and (not shape or any(s in t.case for s in shape))
    ]  # fmt: skip
    if not targets:
        raise typer.BadParameter("no target is left")
    if reason := IMPLS["kv_splice_"][OURS].available():
        raise typer.BadParameter(reason)
    if busy:
        torch.set_num_threads(1)
    clock = time.thread_time if busy else None
    begin = time.monotonic()
    present, absent = pick_peers(peers, CPU)
    report = Report(commit(), datetime.now(UTC).isoformat(timespec="seconds"), describe(CPU), {}, skipped=absent)
    limits = Limits(CPU, 0.4, clock)
    for (name, case, dtype), needed in jobs(targets).items():
        console.print(f"{name.removesuffix('_')} {case} {dtype}", style="dim", highlight=False)
        options = Options(CPU, dtype, (OURS,), seconds, clock=clock)
        report.rows += run_case(name, case_of(name, case), options, limits, offering(needed, present))
    report = replace(report, limits=limits.describe(), seconds=round(time.monotonic() - begin, 1))
    measured = [(t, measure(t, report.rows, report.limits)) for t in targets]
    console.print(limits_line(report), highlight=False)
    console.print(target_table(measured, report.rows))
    for name, why in absent.items():
        console.print(f"skipped: {name} ({why})", style="dim", highlight=False)
    missed = sum(x is not None and not t.met(x) for t, x in measured)
    unmeasured = sum(x is None for _, x in measured)
    console.print(f"{len(measured)} targets, {missed} missed, {unmeasured} not measured", style="bold", highlight=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found = [{"target": t.name, "measured": x, "bound": t.bound, "met": t.met(x)} for t, x in measured]
        page = {"report": asdict(report), "targets": found}
        out.write_text(json.dumps(plain(page), indent=1, allow_nan=False) + "\n")
    if any(row.correct is False and not row.is_peer for row in report.rows):
        raise typer.Exit(1)
