"""`mc ingest`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..printable import printable
from .options import SHIPPED_GISTS, Budget, Gistnet, Memory, Model
from .terminal import err, open_memory, out, typed


def ingest(
    memory: Memory,
    sources: Annotated[list[Path], typer.Argument(help="UTF-8 text files, or - for standard input.")],
    fast: Annotated[bool, typer.Option("--fast", help="Encode with GistNet alone, without the model.")] = False,
    title: Annotated[str | None, typer.Option(help="Name of the document.", show_default="the file's name")] = None,
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    gistnet: Gistnet = SHIPPED_GISTS,
) -> None:
    """Read texts into a memory.

    Each file becomes one document, wholly or not at all. Example: [bold]mc ingest memory/ book.txt notes.md[/]
    """
    from ..sources import read_source, read_text

    for source in sources:  # what is not there is said before the model is loaded
        if str(source) != "-" and (source.is_dir() or not source.exists()):
            read_text(source)
    with open_memory(memory, model, budget=budget, gistnet=gistnet) as session:
        for source in sources:
            text = [typed()] if str(source) == "-" else source  # pieces are text, also where they look like a path
            read = read_source(text, session.model.tokenizer, title=title)
            with Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=err,
            ) as bar:  # fmt: skip
                task = bar.add_task(printable(read.title[:40]), total=len(read.ids))
                document = session.ingest_source(
                    read, mode="fast" if fast else "contextual", progress=lambda n, t=task: bar.update(t, completed=n)
                )
            out.print(f"{printable(document.title)}: tokens {document.start:,} to {document.stop:,}", soft_wrap=True)
