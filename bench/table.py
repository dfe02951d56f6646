"""The report as one aligned table, and the line that says where to work."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from .rows import Report, Row

# An op whose limit is matrix work is shown in TFLOP/s, the others in GB/s.
FLOPS_PER_BYTE = 30.0


def seconds(x: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if x >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x / 1e-9:.3g} ns"


def throughput(row: Row) -> str:
    if row.median_s is None:
        return ""
    if row.flops > FLOPS_PER_BYTE * row.bytes:
        return f"{row.flops / row.median_s / 1e12:.3g} TFLOP/s"
    return f"{row.bytes / row.median_s / 1e9:.3g} GB/s"


def host(row: Row) -> str:
    """What the host takes to issue a call; "waits" where it has a part in the median."""
    return "waits" if row.waits else "" if row.host_s is None else seconds(row.host_s)


def _cells(row: Row) -> tuple[str, ...]:
    if row.median_s is None or row.spread is None or row.fraction_of_limit is None:
        return row.error or "not timed", "", "", "", "", ""
    against = f"{row.peer_ratio:.2f}x {row.peer}" if row.peer_ratio is not None else ""
    limit = f"{row.fraction_of_limit:.0%}"
    return seconds(row.median_s), f"±{row.spread:.0%}", host(row), throughput(row), limit, against


def table(report: Report) -> Table:
    """Ours bold, peers dim, what is wrong red."""
    out = Table(title=None, box=None, pad_edge=False, header_style="bold", row_styles=())
    columns = {
        "op": "left", "case": "left", "dtype": "left", "backend": "left", "median": "right", "spread": "right",
        "host": "right", "rate": "right", "of limit": "right", "best peer / ours": "right", "cache": "left",
    }  # fmt: skip
    if not any(host(row) for row in report.rows):  # of a CPU
        del columns["host"]
    for name, justify in columns.items():
        out.add_column(name, justify=justify, no_wrap=name not in ("median", "cache"))  # type: ignore[arg-type]
    last: tuple[str, ...] | None = None
    for row in report.rows:
        style = "red" if row.correct is False else "dim" if row.is_peer or row.median_s is None else "bold"
        measured_together = row.op, row.case, row.dtype
        first = measured_together != last
        if first and last is not None:
            out.add_row()
        last = measured_together
        head = measured_together if first else ("", "", "")
        figures = zip(("median", "spread", "host", "rate", "of limit", "best peer / ours"), _cells(row), strict=True)
        shown = (Text(x, style) for name, x in figures if name in columns)
        out.add_row(*head, Text(row.backend, style), *shown, row.cache if first else "")
    return out


def furthest(report: Report) -> str:
    """The one line that matters: which op, served by its best backend, is furthest from its limit."""
    best: dict[tuple[str, ...], Row] = {}
    for row in report.rows:
        if row.is_peer or row.median_s is None:
            continue
        key = row.op, row.case, row.dtype
        known = best.get(key)
        if known is None or row.median_s < (known.median_s or 0.0):
            best[key] = row
    if not best:
        return "Nothing was timed."
    worst = min(best.values(), key=lambda row: row.fraction_of_limit or 0.0)
    text = (
        f"Furthest from its limit: {worst.op} {worst.case} ({worst.backend}), {worst.fraction_of_limit:.1%}: "
        f"{seconds(worst.median_s or 0.0)} where {seconds(worst.limit_s or 0.0)} would do"
    )
    return text + (f"; best peer {worst.peer} takes {worst.peer_ratio:.2f}x ours." if worst.peer_ratio else ".")


def notes(report: Report) -> list[str]:
    """What a reader must know about rivals, each once."""
    said: dict[tuple[str, str, bool], dict[str, None]] = {}
    for row in report.rows:
        if row.note:
            said.setdefault((row.op, row.note, row.same_work), {})[row.backend] = None
    return [
        f"{op}, {'; '.join(names)}: {note}{'' if same else ' (never counted as best peer)'}"
        for (op, note, same), names in said.items()
    ]


def limits_line(report: Report) -> str:
    """Limits and machine in two lines."""
    x, m = report.limits, report.machine
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in x["matrix_rate"].items())
    name = m.get("gpu") or m["cpu"]
    return (
        f"{name}, {m['cores']} cores, {m['threads']} threads, torch {m['torch']}, commit {report.commit}\n"
        f"GB/s: read {x['read_bandwidth'] / 1e9:.1f}, copy {x['copy_bandwidth'] / 1e9:.1f}, "
        f"in place {x['update_bandwidth'] / 1e9:.1f}; matrix TFLOP/s: "
        f"{rates or 'not needed'}; load before the run {m['load']}"
    )
