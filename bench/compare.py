"""Two reports side by side: what became slower than the noise of both runs explains."""

from __future__ import annotations

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
    """new / old time of one of our rows. noise: the relative difference that the two spreads explain."""

    row: Row
    old_s: float
    noise: float

    @property
    def ratio(self) -> float:
        return (self.row.median_s or float("inf")) / self.old_s

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + max(self.noise, LEAST_CHANGE)

    @property
    def faster(self) -> bool:
        return self.ratio < 1 / (1 + max(self.noise, LEAST_CHANGE))


def compare(new: Report, old: Report) -> list[Change]:
    """Changes of the rows of ours that were timed then; one that is wrong or missing its time now has an infinite ratio.

    Two machines cannot be compared in seconds: where their limits differ the times are scaled by the bandwidth's ratio.
    """
    before = {row.key: row for row in old.rows if row.median_s is not None and not row.is_peer}
    scale = old.limits["copy_bandwidth"] / new.limits["copy_bandwidth"] if old.machine != new.machine else 1.0
    changes = []
    for row in new.rows:
        known = before.get(row.key)
        if known is None or known.median_s is None or row.is_peer:
            continue
        noise = (known.spread or 0.0) + (row.spread or 0.0)
        changes.append(Change(row, known.median_s * scale, noise))
    return changes


def comparison_table(changes: Sequence[Change]) -> Table:
    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("op", "case", "backend", "before", "now", "now / before", "noise", ""):
        out.add_column(name, justify="right" if name in ("before", "now", "now / before", "noise") else "left")
    for change in changes:
        row = change.row
        verdict = Text("slower", "red") if change.slower else Text("faster", "green") if change.faster else Text("")
        now = seconds(row.median_s) if row.median_s is not None else row.error or "not timed"
        out.add_row(
            row.op, row.case, row.backend, seconds(change.old_s), now, f"{change.ratio:.2f}", f"±{change.noise:.0%}", verdict
        )  # fmt: skip
    return out
