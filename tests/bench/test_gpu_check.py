"""`bench/gpu_check.py`: what it judges, without a GPU; and a run of it where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from bench.gpu import check, junit
from bench.gpu.budget import SHARES, Budget
from bench.gpu.check import app, case_of, in_order, last_line, measure, run_cases, verdicts
from bench.gpu.junit import Outcome as Ran
from bench.gpu.junit import read_tests, run_tests
from bench.gpu.targets import ALSO, TARGETS, Measure, Target
from bench.machine import ROOT
from bench.rows import Row
from bench.suite import CachePlan
from bench.workloads import OPS

SLOTS = Target("kv_splice_", "a", "triton", Measure.DEVICE, 20e-6)
ORDERED = Target("kv_splice_", "b", "triton", Measure.LIMIT, 0.8)
ROW = Row(
    "kv_splice", "b", "triton", "cuda", "bfloat16", 1, 1,
    median_s=1e-3, limit_s=0.85e-3, fraction_of_limit=0.85, correct=True,
)  # fmt: skip
PASSED = Ran(3, 0, ())


def test_every_target_names_a_case() -> None:
    for op, name in [(t.op, t.case) for t in TARGETS] + list(ALSO):
        assert case_of(op, name).name == name


def test_cuda_has_targets_of_its_own() -> None:
    asked = {(t.op, t.measure.name): t.bound for t in TARGETS if t.backend == "cuda"}
    want = {("kv_splice_", "LIMIT"): 0.9, ("kv_splice_", "DEVICE"): 8e-6, ("lens_score", "DEVICE"): 25e-6}
    assert asked == pytest.approx(want | {("gist_encode", "TIMES"): 1.5, ("refocus_", "DEVICE"): 150e-6})


def test_a_share_is_a_least_and_a_time_a_most() -> None:
    assert ORDERED.met(0.8)
    assert not ORDERED.met(0.79)
    assert SLOTS.met(20e-6)
    assert not SLOTS.met(21e-6)
    assert not SLOTS.met(None)


def test_a_row_gives_the_figure_of_its_target() -> None:
    rows, device = [replace(ROW, backend="ref", fraction_of_limit=0.1), ROW], torch.device("cuda")
    assert measure(ORDERED, rows, device) == 0.85
    assert measure(ORDERED, rows[:1], device) is None
    assert measure(ORDERED, [replace(ROW, median_s=None, error="wrong")], device) is None


def test_kernels_are_held_against_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = "SmolLM2-135M/N1"
    row = replace(ROW, op="gist_encode", case=case, backend="cuda", limit_s=4e-6)
    target = Target("gist_encode", case, "cuda", Measure.TIMES, 1.5)
    ran = []
    monkeypatch.setattr(check, "kernel_seconds", lambda run, states: ran.append(len(states)) or 5e-6)
    monkeypatch.setattr(check, "plan_cache", lambda *_: CachePlan(1, False, ""))
    found = measure(target, [row], torch.device("cpu"))
    assert found == pytest.approx(1.25)
    assert target.met(found)
    assert not target.met(1.51)
    assert check.shown(target, found) == "1.250"
    assert ran == [1]


def test_parts_end_in_time_and_leave_the_rest_to_others() -> None:
    now = [100.0]
    budget = Budget(480, lambda: now[0])
    assert sum(SHARES.values()) == pytest.approx(1)
    assert [budget.left(part) for part in SHARES] == pytest.approx([216, 408, 480])
    now[0] += 100
    assert budget.spent == 100
    assert budget.left("cases") == pytest.approx(308)
    assert budget.share("cases") == pytest.approx(192)
    now[0] += 400
    assert budget.left("targets") == pytest.approx(-20)


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def timed_cases(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, tuple[str, ...]]]:
    """Cases that take a minute where a rival is slow to start, else 30 s: what ran, with its rivals."""
    ran = []

    def run_case(op: str, case: Any, options: Any, limits: Any, rivals: Any, **_: Any) -> list[Row]:
        ran.append((op, case.name, tuple(rivals)))
        clock[0] += 60 if "slow" in rivals else 30
        return [replace(ROW, op=op, case=case.name)]

    monkeypatch.setattr(check, "run_case", run_case)
    return ran


def test_cases_stop_where_the_next_might_be_late(
    clock: list[float], timed_cases: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """0.85 of 480 s. A rival that is slow to start runs on each op's first case, while half of the part is left."""
    peers = {"slow": SimpleNamespace(SLOW_TO_START=True), "fast": SimpleNamespace()}
    rows = run_cases(torch.device("cpu"), Budget(480, lambda: clock[0]), None, peers, {})
    assert clock[0] == 390
    assert len(rows) == len(timed_cases)
    with_slow = [op for op, _, rivals in timed_cases if "slow" in rivals]
    assert with_slow == list(dict.fromkeys(op for op, *_ in timed_cases))[: len(with_slow)]
    assert 3 <= len(with_slow) <= 6
    assert all("fast" in rivals for *_, rivals in timed_cases)
    wanted = len(dict.fromkeys([(t.op, t.case) for t in TARGETS] + list(ALSO)))
    assert capsys.readouterr().out.count("no time left for") == wanted - len(rows)


def test_a_measurement_that_raises_is_a_failure_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> float:
        raise RuntimeError("cannot be captured\nand more")

    monkeypatch.setattr(check, "measure", broken)
    x, reason = check.measured_or_reason(SLOTS, [], torch.device("cuda"))
    assert x is None
    assert reason == f"{SLOTS.name}: RuntimeError: cannot be captured"


def test_nothing_that_failed_is_passed_over() -> None:
    assert verdicts([(ORDERED, 0.9)], PASSED, [ROW]) == []
    assert last_line([], PASSED).startswith("Everything")
    wrong = replace(ROW, correct=False, error="wrong: error 1")
    failures = verdicts([(ORDERED, 0.5), (SLOTS, None)], Ran(1, 0, ("x::y",)), [wrong, replace(wrong, is_peer=True)])
    assert len(failures) == 4
    line = last_line(failures, PASSED)
    for part in ("FAILED (4)", "x::y", "wrong: error 1", "50%, target 80%", "not measured"):
        assert part in line
    assert verdicts([], Ran(0, 0, (), "no test ran"), []) == ["no test ran"]


def test_tests_that_were_not_asked_for_are_no_failure() -> None:
    assert verdicts([(ORDERED, 0.9)], None, [ROW]) == []
    assert last_line([], None) == "The tests were not asked for, every target is met."


def test_every_op_has_a_row_before_any_has_two() -> None:
    """The smallest case of each, then the others, the largest last."""
    order = in_order()
    wanted = list(dict.fromkeys([(t.op, t.case) for t in TARGETS] + list(ALSO)))
    assert sorted(order) == sorted(wanted)
    ops = {op for op, _ in wanted}
    assert {op for op, _ in order[: len(ops)]} == ops
    sizes = [OPS[op].touched(case_of(op, name), check.DTYPE) for op, name in order]
    for part in (sizes[: len(ops)], sizes[len(ops) :]):
        assert part == sorted(part)
    assert in_order(["gist_pool"]) == [pair for pair in order if pair[0] == "gist_pool"]


def test_a_run_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The report is written before the targets are measured, and again with them; other ops are left out."""
    out = tmp_path / "new" / "gpu.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "pick_peers", lambda *_: ({}, {}))
    monkeypatch.setattr(check, "describe", lambda _: {})
    monkeypatch.setattr(check, "Limits", lambda *_, **__: SimpleNamespace(describe=dict))
    monkeypatch.setattr(check, "run_cases", lambda *given: [ROW] if given[5:] == (["lens_score"], 0.1) else [])
    seen = []

    def figure(target: Target, *_: object) -> float:
        seen.append(json.loads(out.read_text())["report"]["rows"][0]["case"])
        return 1e-6

    monkeypatch.setattr(check, "measure", figure)
    app_options = ["--no-tests", "--op", "lens_score", "--seconds", "0.1", "--out", str(out)]
    result = CliRunner().invoke(app, app_options)
    assert result.exit_code == 0, result.output
    page = json.loads(out.read_text())
    asked = [t.name for t in TARGETS if t.op == "lens_score"]
    assert [t["target"] for t in page["targets"]] == asked
    assert seen == [ROW.case] * len(asked)
    assert (page["tests"], page["failures"]) == (None, [])


def test_what_is_found_is_said_at_once() -> None:
    assert check.summary(ROW) == "triton 1 ms"
    assert check.summary(replace(ROW, host_s=2e-4)) == "triton 1 ms (host 200 µs)"
    assert check.summary(replace(ROW, waits=True)) == "triton 1 ms (host waits)"
    assert check.summary(replace(ROW, median_s=None, correct=False, error="wrong: error 1")) == "triton WRONG"
    assert check.summary(replace(ROW, median_s=None, error="not available: no library")) == "triton absent"


@pytest.mark.parametrize(
    ("inner", "passed", "skipped", "failed", "error"),
    [
        ('<testcase classname="a" name="b"/><testcase classname="a" name="c"><skipped/></testcase>', 1, 1, (), None),
        ('<testcase classname="a" name="b"><failure/></testcase>', 0, 0, ("a::b",), None),
        ('<testcase classname="a" name="b"><error/></testcase>', 0, 0, ("a::b",), None),
        ('<testcase classname="a" name="b"><skipped/></testcase>', 0, 1, (), "no test ran"),
        ("", 0, 0, (), "no test ran"),
    ],
)
def test_test_reports(
    inner: str, passed: int, skipped: int, failed: tuple[str, ...], error: str | None, tmp_path: Path
) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    assert read_tests(report) == Ran(passed, skipped, failed, error)


# Stands in for pytest: reports when it is interrupted, and what it was asked for.
INTERRUPTED = """
import signal, sys, time
def report(*_):
    cases = "".join(f'<testcase classname="{a}" name="b"/>' for a in sys.argv if a.startswith("--"))
    path = next(a for a in sys.argv if a.startswith("--junitxml=")).split("=", 1)[1]
    open(path, "w").write(f'<testsuite>{cases}<testcase classname="x" name="y"><failure/></testcase></testsuite>')
    sys.exit(1)
signal.signal(signal.SIGINT, report)
time.sleep(600)
"""


def test_what_ran_before_the_end_of_the_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(junit, "GRACE", 4.0)
    found = run_tests(8.0, under=[sys.executable, "-c", INTERRUPTED], processes=3)
    assert found == Ran(3, 0, ("x::y",), "the tests did not end within 8 s")  # --numprocesses, --dist, --junitxml


def test_what_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(junit, "GRACE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    found = run_tests(4.0, under=[sys.executable, "-c", stubborn])
    assert found == Ran(0, 0, (), "the tests did not end within 4 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "no CUDA device" in result.output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_short_run_on_a_device(tmp_path: Path) -> None:
    """In a process of its own: an illegal access of a kernel would break every later call of this one."""
    out = tmp_path / "gpu.json"
    options = ["--no-tests", "--minutes", "0.5", "--peers", "none", "--seconds", "0.05", "--out", str(out)]
    command = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert out.exists(), f"exit status {done.returncode}:\n{done.stdout[-5000:]}"
    page = json.loads(out.read_text())
    assert page["report"]["rows"], done.stdout[-5000:]
    measured = {row["op"] for row in page["report"]["rows"]}
    for op in {target.op.removesuffix("_") for target in TARGETS} - measured:  # a busy machine needs longer
        assert f"no time left for {op}" in done.stdout, done.stdout[-5000:]
    assert len(page["targets"]) == len(TARGETS), done.stdout[-5000:]
    assert done.returncode == bool(page["failures"])
