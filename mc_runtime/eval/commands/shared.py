"""What the subcommands of `mc eval` have in common: consoles, progress, arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mc_runtime.errors import InputError

# Rich takes a file or a pipe for 80 columns wide, where wide tables lose their cells.
FILE_WIDTH = 200

out_console = Console(
    width=None if sys.stdout.isatty() else FILE_WIDTH, highlight=False, markup=False, emoji=False
)  # fmt: skip
err_console = Console(stderr=True, highlight=False, markup=False, emoji=False)

Texts = Annotated[list[str], typer.Argument(help="Held-out text files (.txt, .txt.xz) or folders.", show_default=False)]
Model = Annotated[str, typer.Option(help="Base model, as in `mc generate`.")]
Out = Annotated[Path | None, typer.Option(help="Write a .json report.", show_default="none")]
Plot = Annotated[Path | None, typer.Option(help="Write a picture (.png, .svg, .pdf).", show_default="none")]
Seed = Annotated[int, typer.Option(help="Of the samples.")]


def progress_bar() -> Progress:
    """Shown on standard error while something is measured."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err_console, transient=True)


def check_at_least(least: int, **values: int) -> None:
    """Raises InputError that names the first value below `least`."""
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}: expected at least {least}, got {value}")
