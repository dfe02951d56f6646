"""Where the time goes and who is faster.

Without arguments: every op, every backend that this machine has, a handful of named shapes, every installed peer.
`e2e` measures the whole loop: ingest, first token, decoding, refocus.
"""

from __future__ import annotations

import math
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mc_kernels.registry import BACKENDS

from .compare import compare, comparison_table
from .dtypes import DTYPES
from .e2e.command import e2e
from .e2e.engines import engines
from .e2e.forward import forward
from .limits import Limits
from .machine import commit, describe
from .peers import peers as all_peers
from .peers import slow_to_start
from .plots import draw, require_matplotlib
from .rows import Report
from .suite import Options, run_case
from .table import furthest, limits_line, notes, table
from .workloads import OPS, choose

SECONDS, QUICK_SECONDS = 0.5, 0.15

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
console = Console()
if not console.is_terminal:  # a pipe or a file has no width to fit in
    console = Console(width=190)


def pick_peers(names: str, device: torch.device) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers that can run and why the others cannot. names: "auto", "all", "none" or a comma-separated list."""
    known = all_peers()
    whole = {"auto": list(known), "all": list(known), "none": []}
    wanted = whole.get(names, [n.strip() for n in names.split(",")])
    if unknown := [n for n in wanted if n not in known]:
        choice = ", ".join(known)
        raise typer.BadParameter(f"--peers: expected auto, all, none or some of {choice}, got {', '.join(unknown)}")
    reasons = {name: known[name].missing(device) for name in wanted}
    absent = {name: reason for name, reason in reasons.items() if reason is not None}
    return {name: known[name] for name in wanted if name not in absent}, absent


@app.callback(invoke_without_command=True)
def ops(
    ctx: typer.Context,
    op: Annotated[list[str] | None, typer.Option(help=f"Op ({', '.join(x.removesuffix('_') for x in OPS)}).")] = None,
    backend: Annotated[list[str] | None, typer.Option(help=f"Backend ({', '.join(BACKENDS)}).")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Part of a case's name; picks from all cases.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32, bf16 (default) or fp16.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    peers: Annotated[
        str,
        typer.Option(help="auto (those slow to start on each op's first case only), all, none, or names with commas."),
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="One small case an op, short timing.")] = False,
    warm: Annotated[bool, typer.Option("--warm", help="Inputs stay in the cache where they fit.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Seconds of timing per candidate.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a .json or .csv report.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for the plots of this run.")] = None,
    compare_with: Annotated[Path | None, typer.Option("--compare", help="Report (.json) of an earlier run.")] = None,
) -> None:
    """Time the ops. Exit status 1 if a result of ours is wrong or, with --compare, slower than noise explains."""
    if ctx.invoked_subcommand is not None:
        return
    if plot is not None:
        require_matplotlib()
    begin = time.perf_counter()
    if not re.fullmatch(r"(cpu|cuda)(:[0-9]+)?", device):
        raise typer.BadParameter(f"--device: expected cpu or cuda, got {device}")
    where = torch.device(device)
    if seconds is not None and not 0 < seconds < math.inf:
        raise typer.BadParameter(f"--seconds: expected a number above 0, got {seconds}")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device: expected a device that is here, got cuda (no CUDA device)")
    if unknown := [b for b in backend or () if b not in BACKENDS]:
        raise typer.BadParameter(f"--backend: expected some of {', '.join(BACKENDS)}, got {', '.join(unknown)}")
    if unknown := [d for d in dtype or () if d not in DTYPES]:
        raise typer.BadParameter(f"--dtype: expected some of {', '.join(DTYPES)}, got {', '.join(unknown)}")
    if out is not None and out.suffix not in (".json", ".csv"):
        raise typer.BadParameter(f"--out: expected a name that ends in .json or .csv, got {out}")
    try:
        cases = choose(op or (), shape or (), quick)
        old = Report.load(compare_with) if compare_with is not None else None
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from None
    present, absent = pick_peers(peers, where)
    jobs = [(o, c, d) for d in dtype or ("bf16",) for o, c in cases]
    report = Report(commit(), datetime.now(UTC).isoformat(timespec="seconds"), describe(where), {}, skipped=absent)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring the machine's limits", total=len(jobs))
        limits = Limits(where, seconds=0.1 if quick else 0.4)
        for name, case, d in jobs:
            options = Options(
                where, DTYPES[d], backend or (), seconds or (QUICK_SECONDS if quick else SECONDS), warm
            )  # fmt: skip
            first = (name, case) == next(job[:2] for job in jobs if job[0] == name)
            rivals = {
                n: module for n, module in present.items() if peers != "auto" or first or not slow_to_start(module)
            }
            report.rows += run_case(
                name, case, options, limits, rivals, lambda text: progress.update(task, description=text)
            )
            progress.advance(task)
    report.limits, report.seconds = limits.describe(), round(time.perf_counter() - begin, 1)
    console.print(limits_line(report), highlight=False)
    console.print(table(report))
    for reason in dict.fromkeys(absent.values()):
        names = ", ".join(name for name, why in absent.items() if why == reason)
        console.print(f"skipped: {names} ({reason})", style="dim", highlight=False)
    for note in notes(report):
        console.print(note, style="dim", highlight=False)
    console.print(furthest(report), style="bold", highlight=False)
    failed = any(row.correct is False and not row.is_peer for row in report.rows)
    if old is not None:
        changes = compare(report, old)
        console.print(comparison_table(changes))
        failed |= any(change.slower for change in changes)
    if out is not None:
        report.save(out)
    if plot is not None:
        draw(report, plot, where, console)
    if failed:
        raise typer.Exit(1)


app.command("e2e")(e2e)
app.command("engines")(engines)
app.command("forward")(forward)
