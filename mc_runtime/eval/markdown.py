"""Tables of reports as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .statistics import Estimate


def estimate(data: dict[str, Any], digits: int = 2) -> str:
    """An estimate of a report, with its interval."""
    return Estimate(**data).text(digits)


def lines_of(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A title, an empty line, and a table."""
    table = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([title, "", *table, *(f"| {' | '.join(row)} |" for row in rows)])
