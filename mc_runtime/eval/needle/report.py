"""What the replies add up to: by task, size and reader, and over depth; as a table, JSON and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from ..markdown import estimate, lines_of
from ..statistics import Estimate
from .run import Record
from .scoring import share

SCHEMA = "megacontext/needle/1"
DEPTHS = 5


@dataclass(frozen=True)
class Row:
    """Replies of one reader to one task at one size. generated, ranked: shares right. seen: mean share of the evidence
    that stood in the context as tokens. swaps: mean per question. seconds: median. by_depth: generated and ranked in
    five equal parts of the history; None where nothing was asked."""

    task: str
    size: int
    reader: str
    generated: Estimate
    ranked: Estimate
    seen: float
    slots: int
    swaps: float
    seconds: float
    copied: float
    by_depth: tuple[tuple[Estimate, Estimate] | None, ...]


def rows(records: Sequence[Record]) -> list[Row]:
    groups: dict[tuple[str, int, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.task, record.size, record.reader), []).append(record)
    return [
        Row(
            *key,
            share([r.generated for r in group]),
            share([float(r.ranked_first) for r in group]),
            sum(r.seen for r in group) / len(group),
            max(r.slots for r in group),
            sum(r.swaps for r in group) / len(group),
            median(r.seconds for r in group),
            sum(r.copied for r in group) / len(group),
            tuple(_at_depth(group, part) for part in range(DEPTHS)),
        )
        for key, group in groups.items()
    ]


def _at_depth(group: Sequence[Record], part: int) -> tuple[Estimate, Estimate] | None:
    inside = [r for r in group if min(int(r.depth * DEPTHS), DEPTHS - 1) == part]
    if not inside:
        return None
    return share([r.generated for r in inside]), share([float(r.ranked_first) for r in inside])


def table(found: Sequence[Row]) -> Table:
    columns = ("task", "tokens", "reader", "generated", "ranked first", "n", "evidence seen", "slots", "swaps", "s")
    result = Table(*columns, title="needles: share right, with 95% intervals", title_justify="left")
    for row in found:
        size = f"{row.size:,}" + (f" ({row.copied:.1%} copied)" if row.copied else "")
        seen = "" if math.isnan(row.seen) else f"{row.seen:.2f}"
        result.add_row(
            row.task, size, row.reader, row.generated.text(), row.ranked.text(), str(row.generated.n), seen,
            f"{row.slots:,}", f"{row.swaps:.1f}", f"{row.seconds:.1f}",
        )  # fmt: skip
    return result


def to_json(setting: dict[str, object], records: Sequence[Record]) -> dict[str, object]:
    """Everything: setting, rows with intervals, every reply."""
    return {
        "schema": SCHEMA,
        "setting": setting,
        "rows": [asdict(row) for row in rows(records)],
        "replies": [record.to_dict() for record in records],
    }


def markdown(data: dict[str, Any]) -> str:
    """A report as a table: readers down, tasks and sizes across; said / ranked first."""
    setting, found = data["setting"], data["rows"]
    places = list(dict.fromkeys((row["task"], row["size"]) for row in found))
    cells = {
        (row["reader"], row["task"], row["size"]): f"{estimate(row['generated'])} / {estimate(row['ranked'])}"
        for row in found
    }
    title = (
        f"Said / ranked first of {setting['candidates']}, n = {setting['n']} questions, {setting['budget']:,} slots, "
        f"gists {setting['gistnet'] or 'untrained'}; {setting['model']}. 95% intervals."
    )
    header = ["reader", *(f"{task}, {size:,} tokens" for task, size in places)]
    readers = dict.fromkeys(row["reader"] for row in found)
    return lines_of(title, header, [[r, *(cells.get((r, *place), "") for place in places)] for r in readers])


def plot(found: Sequence[Row], path: Path) -> None:
    """Share ranked first (points with intervals) and generated (crosses) by size above, and ranked first over depth at
    the largest size below; one column per task. Ours are drawn thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(row.task for row in found))
    readers = list(dict.fromkeys(row.reader for row in found))
    sizes = sorted({row.size for row in found})
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(2.5 + 4 * len(tasks), 7.5), squeeze=False, sharey=True, layout="constrained"
    )
    for column, task in enumerate(tasks):
        above, below = axes[0][column], axes[1][column]
        largest = max(row.size for row in found if row.task == task)
        for number, reader in enumerate(readers):
            mine = sorted((r for r in found if (r.task, r.reader) == (task, reader)), key=lambda r: r.size)
            style = {
                "color": plt.get_cmap("tab20")(number % 20),
                "linewidth": 2.2 if reader.startswith("memory") else 1.0,
            }
            shift = 0.5 * ((number + 0.5) / len(readers) - 0.5)
            at = [sizes.index(r.size) + shift for r in mine]
            values = [r.ranked.value for r in mine]
            low = [r.ranked.value - r.ranked.low for r in mine]
            high = [r.ranked.high - r.ranked.value for r in mine]
            above.errorbar(at, values, (low, high), label=reader, capsize=2, marker="o", markersize=4, **style)
            above.plot(at, [r.generated.value for r in mine], "x", color=style["color"], markersize=6)
            last = [r for r in mine if r.size == largest]
            points = [(i, part[1].value) for r in last for i, part in enumerate(r.by_depth) if part is not None]
            below.plot([(i + 0.5 + shift / 3) / DEPTHS for i, _ in points], [y for _, y in points], marker="o", **style)
        above.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
        above.set_title(task)
        above.set_xlabel("history (tokens)")
        below.set_xlabel(f"depth of the fact in {largest:,} tokens")
        below.set_xlim(0, 1)
    for axis in (axes[0][0], axes[1][0]):
        axis.set_ylabel("ranked first (crosses: generated)")
        axis.set_ylim(-0.03, 1.03)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
