"""`python bench/run.py e2e`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.e2e.history import BookError, made_up_text, read_book
from bench.e2e.measure import Plan, measure
from bench.e2e.plot import draw_latency
from bench.e2e.tables import tables
from mc_runtime import MegaContextError
from mc_runtime.model import DEFAULT_MODEL

TOKENS = (2_000, 32_000, 100_000, 1_000_000)
LONG = 10_000_000
WINDOWS = (2_048, 4_096, 8_192)


def _read_plan(
    tokens: Sequence[int], budget: int | None, steps: int | None, model: str, peers: str, quick: bool, long: bool
) -> Plan:
    """Checks the options."""
    if peers not in ("auto", "none"):
        raise typer.BadParameter(f"--peers: expected auto or none, got {peers}")
    if any(n < 1 for n in tokens):
        raise typer.BadParameter(f"--tokens: expected at least 1, got {min(tokens)}")
    for name, value in (("--budget", budget), ("--steps", steps)):
        if value is not None and value < 1:
            raise typer.BadParameter(f"{name}: expected at least 1, got {value}")
    lengths = set(tokens) or ({600, 5_000} if quick else {*TOKENS, *([LONG] if long else [])})
    return Plan(
        lengths=tuple(sorted(lengths)),
        windows=(256, 512) if quick else WINDOWS,
        budget=budget or (512 if quick else 2048),
        steps=steps or (40 if quick else 192),
        model=model,
        peers=peers == "auto",
        text=made_up_text(4_000) if quick else read_book(),
    )


def e2e(
    tokens: Annotated[
        list[int] | None, typer.Option(help="Length of a history; repeat for several. [2k, 32k, 100k, 1M]")
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="10M tokens too: 8 GB of disk and a minute more.")] = False,
    budget: Annotated[int | None, typer.Option(help="Slots of each Working Context. [2048]")] = None,
    steps: Annotated[int | None, typer.Option(help="Tokens to decode with each memory and rival. [192]")] = None,
    model: Annotated[str, typer.Option(help="Model name, directory or GGUF file.")] = DEFAULT_MODEL,
    peers: Annotated[str, typer.Option(help="auto (transformers and llama.cpp where installed) or none.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes and made-up text: does it run?")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a .json report.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Folder for a plot of time per token over length.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for a trace of one turn, for Perfetto.")] = None,
) -> None:
    """The whole loop: ingest, first token, decoding and refocus of memories of different length, with rivals.

    Histories are the demo's book, its pieces repeated in random order where it is too short, with gists copied from a
    sample that the model has read (0.75 KB a token in the folder for temporary files). Set OMP_NUM_THREADS to the cores
    that are free; rivals get as many.
    """
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width to fit in
        console = Console(width=160)
    if out is not None and out.suffix != ".json":
        raise typer.BadParameter(f"--out: expected a name that ends in .json, got {out}")
    begin = time.perf_counter()
    try:
        plan = _read_plan(tokens or (), budget, steps, model, peers, quick, long)
        report = measure(plan, console, profile)
    except (MegaContextError, BookError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(2) from error
    report.seconds = round(time.perf_counter() - begin, 1)
    for table in tables(report):
        console.print(table)
    console.print(
        "Memories that decode hold the text's tokens and gists copied from a sample that the model has read.",
        style="dim",
    )
    for name, reason in report.skipped.items():
        console.print(f"rival {name} skipped: {reason}", style="dim", highlight=False)
    machine = report.machine
    console.print(
        f"{machine['cpu']}, {machine['threads']} threads, load {machine['load']} at the start; commit {report.commit}; "
        f"{report.seconds:.0f} s in all",
        style="dim",
        highlight=False,
    )
    if out is not None:
        report.save(out)
    if plot is not None:
        console.print(str(draw_latency(report, plot)))
