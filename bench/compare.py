"""Two reports side by side: what became slower than the noise of both runs explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from .rows import Report, Row
from .table import seconds

# Never call less than this a change, however quiet both runs were.
LEAST_CHANGE = 0.05


@dataclass(frozen=True)
class Change:
    """One of our rows then and now.

    noise: the relative difference that the two spreads explain. ratio: new time over old. against_limit: the same with
    times in units of the limit that was measured beside each, so that a machine that is slower today cancels out. A
    change counts when both exceed the noise.
    """

    row: Row
    old: Row

    @property
    def noise(self) -> float:
        return (self.old.spread or 0.0) + (self.row.spread or 0.0)

    @property
    def ratio(self) -> float:
        return (self.row.median_s or math.inf) / (self.old.median_s or math.inf)

    @property
    def against_limit(self) -> float:
        return (self.old.fraction_of_limit or 0.0) / (self.row.fraction_of_limit or 1e-30)

    @property
    def host_ratio(self) -> float | None:
        """New host time over old, where both were measured apart (on a GPU). It decides nothing."""
        return self.row.host_s / self.old.host_s if self.row.host_s and self.old.host_s else None

    @property
    def slower(self) -> bool:
        return min(self.ratio, self.against_limit) > 1 + max(self.noise, LEAST_CHANGE)

    @property
    def faster(self) -> bool:
        return max(self.ratio, self.against_limit) < 1 / (1 + max(self.noise, LEAST_CHANGE))


def compare(new: Report, old: Report) -> list[Change]:
    """Changes of our rows that were timed then; one that is wrong or has no time now has an infinite ratio."""
    before = {row.key: row for row in old.rows if row.median_s is not None and not row.is_peer}
    return [Change(row, before[row.key]) for row in new.rows if row.key in before and not row.is_peer]


def comparison_table(changes: Sequence[Change]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "case", "dtype", "backend"):
        out.add_column(name)
    hosts = any(change.host_ratio is not None for change in changes)
    for name in ("before", "now", "now / before", "in limits", "noise", *(("host, now / before",) if hosts else ())):
        out.add_column(name, justify="right")
    out.add_column("")
    for change in changes:
        row = change.row
        verdict = Text("slower", "red") if change.slower else Text("faster", "green") if change.faster else Text("")
        now = seconds(row.median_s) if row.median_s is not None else row.error or "not timed"
        host = "" if change.host_ratio is None else f"{change.host_ratio:.2f}"
        out.add_row(
            row.op, row.case, row.dtype, row.backend, seconds(change.old.median_s or math.inf), now,
            f"{change.ratio:.2f}", f"{change.against_limit:.2f}", f"±{change.noise:.0%}", *((host,) if hosts else ()),
            verdict,
        )  # fmt: skip
    return out
