"""`mc inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .. import inspection
from .terminal import SHOWN, out


def inspect(
    memory: Annotated[Path, typer.Argument(help="Directory of the memory.", show_default=False)],
    columns: Annotated[int, typer.Option(min=1, help="Width of the focus map.")] = 96,
    last: Annotated[int, typer.Option(min=1, help="How many documents to list, the newest.")] = SHOWN,
    everything: Annotated[bool, typer.Option("--all", help="List all documents.")] = False,
) -> None:
    """Show the tree, its levels and documents, and where the memory looked last. Works while another process writes."""
    from ..tree import Tree

    with Tree.open(memory, mode="r") as tree:
        out.print(inspection.overview(tree), soft_wrap=True)
        table = Table("level", "nodes", "one covers", "pooled", "fast", title="levels", title_justify="left")
        for row in inspection.level_rows(tree):
            table.add_row(*row)
        out.print(table)
        columns_of = ("id", "kind", "title", "tokens", "from", "to", "ingest")
        documents = Table(*columns_of, title="documents", title_justify="left")
        for row in inspection.document_rows(tree, None if everything else last):
            documents.add_row(*row)
        out.print(documents)
        more = inspection.left_out(documents.row_count, tree.count_documents(), "documents", "--all")
        if more:
            out.print(more)
        out.print(inspection.saved_focus_map(tree, columns), soft_wrap=True)
