"""`mc eval table`: reports as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mc_runtime.errors import InputError


def table(
    files: Annotated[list[Path], typer.Argument(help="Reports that `--out` wrote.", show_default=False)],
) -> None:
    """Print reports as Markdown tables."""
    for i, path in enumerate(files):
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable report ({error})") from error
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema not in TABLES:
            raise InputError(f"{path}: expected a report of schema {', '.join(TABLES)}, got {schema!r}")
        typer.echo(("\n" if i else "") + TABLES[schema](data))


def _substitutability(data: dict[str, Any]) -> str:
    from ..report import Report, markdown

    return markdown([Report.from_dict(data)])


def _focus(data: dict[str, Any]) -> str:
    from ..focus_report import markdown

    return markdown(data)


def _needle(data: dict[str, Any]) -> str:
    from ..needle.report import markdown

    return markdown(data)


def _pivot(data: dict[str, Any]) -> str:
    from ..pivot.report import markdown

    return markdown(data)


def _layout(data: dict[str, Any]) -> str:
    from ..layout_report import markdown

    return markdown(data)


def _staleness(data: dict[str, Any]) -> str:
    from ..staleness_report import markdown

    return markdown(data)


# By the schema that a report names.
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "megacontext/substitutability/1": _substitutability,
    "megacontext/focus/1": _focus,
    "megacontext/needle/1": _needle,
    "megacontext/pivot/1": _pivot,
    "megacontext/layout/1": _layout,
    "megacontext/staleness/1": _staleness,
}
