"""A report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.e2e.memories import PARTS
from bench.e2e.report import EndToEndReport
from bench.e2e.trace import Range

MIB = 1 << 20


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def tables(report: EndToEndReport) -> Iterator[Table]:
    """All of them, in the order of the measurements."""
    yield _ingest(report)
    if report.first_token:
        yield _first_token(report)
    if report.decode:
        yield _decode(report)
        yield _refocus(report)
        yield _sizes(report)
    if report.rivals:
        yield _rivals(report)


def _ingest(report: EndToEndReport) -> Table:
    table = _table("Ingest", "mode", "tokens", "seconds", "tokens per second")
    for mode, row in report.ingest.items():
        table.add_row(mode, f"{row['tokens']:,}", _number(row["seconds"]), _number(row["tokens_per_s"], 0))
    return table


def _first_token(report: EndToEndReport) -> Table:
    names = list(dict.fromkeys(row["name"] for row in report.rivals))
    columns = [f"{name}: text and question" for name in names]
    columns += ["transformers: question alone"] if "transformers" in names else []
    title = "Seconds to the first token (the memory has read the text before, see ingest)"
    table = _table(title, "window", "memory: first question", "later question", *columns)
    for row in report.first_token:
        rivals = {r["name"]: r for r in report.rivals if r["window"] == row["window"]}
        cells = [_number(rivals.get(name, {}).get("prefill_s"), 2) for name in names]
        if "transformers" in names:
            cells.append(_number(rivals.get("transformers", {}).get("question_s"), 2))
        ours = (_number(row["first_question_s"], 2), _number(row["later_question_s"], 2))
        table.add_row(f"{row['window']:,}", *ours, *cells)
    return table


def _spread(row: dict[str, Any]) -> str:
    low, high = row["spread"]
    return f"{_number(row['ms_per_token'])} ({_number(low)} to {_number(high)})"


def _decode(report: EndToEndReport) -> Table:
    title = "Decoding, in alternation: ms per token, median (quartiles)"
    table = _table(
        title, "tokens in the tree", "slots", "ms per token", "ratio", "all in", "ms per refocus",
        "first question, s", "later question, s",
    )  # fmt: skip
    base = report.decode[0]["ms_per_token"]
    for row in report.decode:
        ratio = row["ms_per_token"] / base if base and row["ms_per_token"] else None
        cells = [_number(row["ms_per_token_all_in"]), _number(row["ms_per_refocus"], 0)]
        cells += [_number(row["first_turn_s"], 2), _number(row["first_token_s"], 2)]
        table.add_row(f"{row['tokens']:,}", f"{row['slots']:,}", _spread(row), _number(ratio, 3), *cells)
    return table


def _refocus(report: EndToEndReport) -> Table:
    title = "One refocus by part, median ms: after a user's turn / while decoding"
    table = _table(title, "tokens in the tree", "entries recomputed", *PARTS, "whole")
    for row in report.decode:
        counts = row["recomputed_entries"]
        cells = [f"{_number(counts['turn'], 0)} / {_number(counts['decode'], 0)}"]
        for part in (*PARTS, "refocus"):
            turn, decode = (row[kind].get(part) for kind in ("turn_refocus_parts_ms", "refocus_parts_ms"))
            cells.append(f"{_number(turn)} / {_number(decode)}")
        table.add_row(f"{row['tokens']:,}", *cells)
    return table


def _sizes(report: EndToEndReport) -> Table:
    columns = ("opening, ms", "on disk, MiB", "memory of the session, MiB", "mapped files touched, MiB")
    table = _table("Opening and sizes", "tokens in the tree", *columns)
    for row in report.decode:
        memory = row["memory_bytes"]
        cells = [_number(row["open_s"] * 1e3), _number(row["disk_bytes"] / MIB)]
        cells += [_number(memory[name] / MIB) if name in memory else "-" for name in ("anonymous", "files")]
        table.add_row(f"{row['tokens']:,}", *cells)
    return table


def _rivals(report: EndToEndReport) -> Table:
    title = "Rivals with the text in their window: ms per token, median (quartiles); llama.cpp after the others"
    table = _table(title, "rival", "settings", "window", "ms per token")
    for row in report.rivals:
        table.add_row(row["name"], row["settings"], f"{row['window']:,}", _spread(row))
    return table


def profile_tables(ranges: Sequence[Range], operators: Sequence[Range], trace: Path) -> Iterator[Table]:
    """What one turn under the profiler consisted of."""
    named = (
        (f"Longest ranges of one turn ({trace})", ranges),
        ("Longest operators of the same turn, own time", operators),
    )
    for title, rows in named:
        table = _table(title, "name", "count", "ms together", "ms, longest" if rows is ranges else "ms each")
        for row in rows:
            table.add_row(row.name, f"{row.count:,}", _number(row.seconds * 1e3), _number(row.longest * 1e3, 2))
        yield table
