"""The report's form, the choice of cases, and what is printed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from small_cases import TINY

from bench.rows import Report, Row
from bench.table import furthest, limits_line, seconds, table, throughput
from bench.workloads import CASES, HEADLINE, OPS, QUICK, choose

TOP_LEVEL = {"commit", "date", "machine", "limits", "rows", "skipped", "seconds"}
ROW_KEYS = {
    "op", "case", "backend", "device", "dtype", "median_s", "spread", "bytes", "flops", "fraction_of_limit", "peer",
    "peer_ratio", "correct", "error",
}  # fmt: skip


def row(op: str, case: str = "case", backend: str = "cpu", **more: Any) -> Row:
    return Row(op, case, backend, "cpu", "bfloat16", more.pop("bytes", 1000), more.pop("flops", 2000), **more)


def timed(op: str, median: float, fraction: float, **more: Any) -> Row:
    figures = {"median_s": median, "spread": 0.1, "limit_s": median * fraction, "fraction_of_limit": fraction}
    return row(op, **{"correct": True, "runs": 10} | figures | more)


MIXED = (
    timed("kv_splice", 2e-3, 0.5, peer="torch", peer_ratio=1.5),
    row("kv_splice", backend="ref", correct=False, error="wrong: error 1.00e+00, allowed 1.00e-02", max_error=1.0),
    row("kv_splice", backend="cuda", error="not available: no CUDA device"),
    timed("kv_splice", 3e-3, 0.33, backend="torch", is_peer=True),
    timed("gist_encode", 1e-6, 0.25, flops=10**6),
    timed("gist_encode", 2e-6, 0.125, backend="ref", flops=10**6),
)
MACHINE = {"cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13.0", "load": 0.5}
LIMITS = {
    "read_bandwidth": 2e10, "copy_bandwidth": 1e10, "update_bandwidth": 1.5e10, "matrix_rate": {"bfloat16": 1e12},
    "matrix_rate_at_rows": {"bfloat16[32]": 5e11},
}  # fmt: skip


def report(*rows: Row) -> Report:
    return Report(
        "abc123", "2026-01-01T00:00:00+00:00", MACHINE, LIMITS, list(rows), {"liger": "needs a CUDA device"}, 1.5
    )


def printed(thing: Any) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(thing)
    return console.export_text()


def test_json_of_a_real_run(tiny_cli: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    result = tiny_cli("--peers", "torch,liger", "--out", str(out))
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert set(data) == TOP_LEVEL
    assert {row["op"] for row in data["rows"]} == {op.removesuffix("_") for op in OPS}
    assert all(set(row) >= ROW_KEYS for row in data["rows"])
    assert all(row["correct"] and row["error"] is None for row in data["rows"])
    assert data["skipped"] == {"liger": "needs a CUDA device"}
    assert "skipped: liger (needs a CUDA device)" in result.output
    assert {"read_bandwidth", "copy_bandwidth", "matrix_rate"} <= set(data["limits"])
    assert {"cpu", "cores", "threads", "torch", "device", "load"} <= set(data["machine"])
    loaded = Report.load(out)
    assert asdict(loaded) == data


def test_json_round_trip(tmp_path: Path) -> None:
    before = report(*MIXED)
    before.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == before


def test_json_has_no_number_that_json_does_not_know(tmp_path: Path) -> None:
    """NaN and Infinity are no JSON: other readers refuse the whole file."""
    nan_kernel = row("gist_pool", correct=False, max_error=float("inf"), error="wrong: error inf, allowed 1e-3")
    report(nan_kernel).save(tmp_path / "report.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)


def test_csv_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    report(*MIXED).save(path)
    with path.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(MIXED)
    for text, known in zip(read, MIXED, strict=True):
        assert text == {key: "" if value is None else str(value) for key, value in asdict(known).items()}


def test_every_row_is_identified_once() -> None:
    assert len({row.key for row in MIXED}) == len(MIXED)


def test_case_names_are_unique() -> None:
    for op, cases in CASES.items():
        names = [case.name for case in cases]
        assert len(names) == len(set(names)), op


@pytest.mark.parametrize("listed", [HEADLINE, QUICK], ids=["headline", "quick"])
def test_listed_cases_exist(listed: dict[str, tuple[str, ...]]) -> None:
    assert set(listed) == set(OPS) == set(CASES)
    for op, names in listed.items():
        assert set(names) <= {case.name for case in CASES[op]}, op
        assert len(set(names)) == len(names) > 0


def test_choose_defaults_to_the_headline() -> None:
    assert [(op, case.name) for op, case in choose()] == [(op, name) for op in OPS for name in HEADLINE[op]]
    assert [(op, case.name) for op, case in choose(quick=True)] == [(op, name) for op in OPS for name in QUICK[op]]


def test_choose_by_op_and_shape() -> None:
    assert {op for op, _ in choose(["kv_splice"])} == {"kv_splice_"}
    assert {op for op, _ in choose(["kv_splice_", "gist_pool"])} == {"kv_splice_", "gist_pool"}
    chosen = choose(["context_attention"], ["llama-3-8b/32K", "2k/decode"])
    names = {case.name for _, case in chosen}
    assert {"Llama-3-8B/32k/decode", "Llama-3-8B/32k/prefill512", "SmolLM2-135M/2k/decode"} <= names
    assert all("llama-3-8b/32k" in name.lower() or "2k/decode" in name.lower() for name in names)


@pytest.mark.parametrize(
    ("ops", "shapes", "message"),
    [
        (["splice"], [], "op: expected one of .*kv_splice.*'splice'"),
        (["gist_pool", "nonsense"], [], "nonsense"),
        ([], ["no-such-model"], "shape: .*no-such-model"),
        (["gist_pool"], ["decode"], "gist_pool.*decode"),
    ],
)
def test_choose_names_what_it_does_not_know(ops: list[str], shapes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose(ops, shapes)


def test_table_shows_every_row() -> None:
    text = printed(table(report(*MIXED)))
    for expected in ("2 ms", "±10%", "50%", "1.50x torch", "wrong: error 1.00e+00", "not available: no CUDA device"):
        assert expected in text
    wrong = next(line for line in text.splitlines() if "wrong" in line)
    assert "GB/s" not in wrong, "no speed beside a wrong result"


def test_table_of_nothing() -> None:
    assert "op" in printed(table(report()))
    assert furthest(report()) == "Nothing was timed."


def test_furthest_names_the_worst_op_by_its_best_backend() -> None:
    """gist_encode at 25% by its best backend is worse than kv_splice at 50%; its ref row at 12.5% does not count."""
    line = furthest(report(*MIXED))
    assert line.startswith("Furthest from its limit: gist_encode case (cpu), 25.0%")
    assert "kv_splice" not in line


def test_furthest_ignores_peers_and_rows_without_time() -> None:
    line = furthest(report(timed("gist_pool", 1.0, 0.01, backend="torch", is_peer=True), *MIXED[:3]))
    assert "kv_splice case (cpu), 50.0%" in line
    assert "torch takes 1.50x ours" in line


def test_limits_line_names_machine_and_limits() -> None:
    line = limits_line(report())
    for expected in ("a processor", "2 threads", "abc123", "20.0", "10.0", "bfloat16 1.00", "load"):
        assert expected in line


@pytest.mark.parametrize(
    ("value", "text"), [(2.5, "2.5 s"), (1.5e-3, "1.5 ms"), (2e-6, "2 µs"), (3e-9, "3 ns"), (0.9999e-3, "1e+03 µs")]
)
def test_seconds(value: float, text: str) -> None:
    assert seconds(value) == text


def test_throughput_in_what_bounds_the_op() -> None:
    assert throughput(timed("gist_pool", 1e-6, 0.5)) == "1 GB/s"
    assert throughput(timed("gist_encode", 1e-6, 0.5, flops=10**6)) == "1 TFLOP/s"
    assert throughput(row("gist_pool")) == ""


def test_bandwidth_and_rate_of_a_row() -> None:
    done = timed("gist_pool", 0.5, 0.5)
    assert done.bandwidth == 2000
    assert done.rate == 4000
    assert row("gist_pool").bandwidth is None
    assert row("gist_pool").rate is None


@pytest.mark.parametrize("op", OPS)
def test_bytes_and_flops_are_counted(op: str) -> None:
    """An op that moves nothing has no limit: every case moves bytes, and only a splice may compute nothing."""
    import torch

    for case in [*CASES[op], TINY[op]]:
        assert case.bytes(torch.bfloat16) > 0, case.name
        assert case.flops() > 0 or op == "kv_splice_", case.name


def test_two_dtypes_of_a_case_stand_apart() -> None:
    """Each has its own head, and the faster dtype does not hide the other from the line that matters."""
    slow = replace(timed("gist_pool", 2e-3, 0.01), dtype="float32")
    both = report(timed("gist_pool", 1e-3, 0.5), slow)
    dtypes = list(table(both).columns[2].cells)
    assert [x for x in dtypes if x] == ["bfloat16", "float32"]
    assert "1.0%" in furthest(both)


def test_a_gpu_s_rows_have_the_host_beside_them() -> None:
    """A column of its own, which a CPU's table lacks; what waits for the device has no such figure."""
    apart = timed("kv_splice", 10e-6, 0.5, host_s=400e-6)
    waits = timed("kv_splice", 20e-6, 0.5, case="other", waits=True)
    text = printed(table(report(apart, waits)))
    for part in ("host", "400 µs", "10 µs", "waits"):
        assert part in text
    assert "host" not in printed(table(report(*MIXED)))
