"""What the turns add up to, by reader and kind of turn; as tables, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.table import Table

from ..markdown import estimate, lines_of
from ..needle.scoring import share
from ..statistics import Estimate
from .run import Record

SCHEMA = "megacontext/pivot/1"
KINDS = ("first", "stay", "pivot", "return", "updated")


@dataclass(frozen=True)
class Row:
    """Turns of one kind by one reader. generated, ranked: shares right. stale_said, stale_ranked: shares that gave or
    preferred the old value; None where nothing had changed. refocused: share of turns in which all of the evidence
    stood as tokens by the end of the answer; refocus_tokens: of those, median tokens since the question began. swaps:
    mean per turn. seconds: median."""

    reader: str
    kind: str
    generated: Estimate
    ranked: Estimate
    stale_said: Estimate | None
    stale_ranked: Estimate | None
    refocused: Estimate
    refocus_tokens: float | None
    swaps: float
    slots: int
    seconds: float


def rows(records: Sequence[Record]) -> list[Row]:
    readers = list(dict.fromkeys(r.reader for r in records))
    groups = [(reader, kind, _of(records, reader, kind)) for reader in readers for kind in KINDS]
    return [_row(reader, kind, group) for reader, kind, group in groups if group]


def _of(records: Sequence[Record], reader: str, kind: str) -> list[Record]:
    return [r for r in records if (r.reader, r.kind) == (reader, kind)]


def _row(reader: str, kind: str, group: Sequence[Record]) -> Row:
    reached = [r.refocus for r in group if r.refocus is not None]
    changed = kind == "updated"
    return Row(
        reader,
        kind,
        share([r.generated for r in group]),
        share([float(r.ranked_first) for r in group]),
        share([float(r.stale_said) for r in group]) if changed else None,
        share([float(r.stale_ranked) for r in group]) if changed else None,
        share([float(r.refocus is not None) for r in group]),
        median(reached) if reached else None,
        mean(r.swaps for r in group),
        max(r.slots for r in group),
        median(r.seconds for r in group),
    )


def table(found: Sequence[Row]) -> Table:
    columns = (
        "reader", "turn", "generated", "ranked first", "n", "old value said; preferred", "in detail", "after tokens",
        "swaps", "slots",
    )  # fmt: skip
    result = Table(*columns, title="turns: share right, with 95% intervals", title_justify="left")
    for row in found:
        stale = ""
        if row.stale_said is not None and row.stale_ranked is not None:
            stale = f"{row.stale_said.text()}; {row.stale_ranked.text()}"
        after = "" if row.refocus_tokens is None else f"{row.refocus_tokens:.0f}"
        result.add_row(
            row.reader, row.kind, row.generated.text(), row.ranked.text(), str(row.generated.n), stale,
            f"{row.refocused.value:.2f}", after, f"{row.swaps:.1f}", f"{row.slots:,}",
            end_section=row.kind == KINDS[-1],
        )  # fmt: skip
    return result


def to_json(setting: dict[str, object], records: Sequence[Record]) -> dict[str, object]:
    """Everything: setting, rows with intervals, every turn."""
    return {
        "schema": SCHEMA,
        "setting": setting,
        "rows": [asdict(row) for row in rows(records)],
        "turns": [record.to_dict() for record in records],
    }


def markdown(data: dict[str, Any]) -> str:
    """A report as a table: readers down, kinds of turn across; said / ranked first. Then what changed in the memory."""
    setting, found = data["setting"], data["rows"]
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in found)]
    by = {(row["reader"], row["kind"]): row for row in found}
    lines = []
    for reader in dict.fromkeys(row["reader"] for row in found):
        mine = [by.get((reader, kind)) for kind in kinds]
        cells = ["" if row is None else f"{estimate(row['generated'])} / {estimate(row['ranked'])}" for row in mine]
        seen = [row for row in mine if row is not None]
        stale = [estimate(row["stale_said"]) for row in seen if row["stale_said"] is not None]
        turns = sum(row["generated"]["n"] for row in seen)
        swaps = sum(row["swaps"] * row["generated"]["n"] for row in seen) / turns
        after = [f"{row['refocus_tokens']:.0f}" for row in seen if row["kind"] == "pivot" and row["refocus_tokens"]]
        lines.append([reader, *cells, "".join(stale), f"{swaps:.1f}", "".join(after)])
    title = (
        f"Said / ranked first of {setting['candidates']}, n = {setting['n']} conversations over {setting['size']:,} "
        f"tokens, {setting['budget']:,} slots, gists {setting['gistnet'] or 'untrained'}; {setting['model']}. 95% "
        "intervals."
    )
    return lines_of(title, ["reader", *kinds, "old value said", "swaps per turn", "tokens to refocus"], lines)


def plot(found: Sequence[Row], path: Path) -> None:
    """Share ranked first (bars) and generated (dots) by kind of turn, a colour per reader."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    readers = list(dict.fromkeys(row.reader for row in found))
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in found)]
    figure, axis = plt.subplots(figsize=(2 + 2.2 * len(kinds), 4.5), layout="constrained")
    width = 0.85 / len(readers)
    for i, reader in enumerate(readers):
        mine = {row.kind: row for row in found if row.reader == reader}
        at = [k + (i - (len(readers) - 1) / 2) * width for k, kind in enumerate(kinds) if kind in mine]
        chosen = [mine[kind] for kind in kinds if kind in mine]
        values = [row.ranked.value for row in chosen]
        errors = ([v - r.ranked.low for v, r in zip(values, chosen, strict=True)],
                  [r.ranked.high - v for v, r in zip(values, chosen, strict=True)])  # fmt: skip
        axis.bar(at, values, width * 0.9, yerr=errors, capsize=2, label=reader, color=plt.get_cmap("tab10")(i % 10))
        axis.plot(at, [row.generated.value for row in chosen], "k.", markersize=5)
    axis.set_xticks(range(len(kinds)), kinds)
    axis.set_ylabel("ranked first (dots: generated)")
    axis.set_ylim(0, 1.02)
    axis.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
