"""`bench/cpu_check.py`: what its targets need and how a row is judged, and a short run of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.cpu import check
from bench.cpu.check import app, jobs, offering, time_of
from bench.cpu.targets import TARGETS, Measure, Target, case_of, measure
from bench.peers import peers
from bench.peers.llama_cpp import bytes_touched
from bench.rows import Row
from mc_kernels.registry import IMPLS

BF16 = torch.bfloat16
CASE, TAIL = "SmolLM2-135M/8k/ordered-rope/1-collapse", "SmolLM2-135M/32k/ordered-rope/1-collapse"
ROW = Row("kv_splice", CASE, "cpu", "cpu", "bfloat16", 100, 1, median_s=2.0, fraction_of_limit=0.6, correct=True)
RIVAL = replace(ROW, backend="llama.cpp", median_s=8.0, is_peer=True)
LIMITS = {"read_bandwidth": 100.0, "copy_bandwidth": 40.0, "update_bandwidth": 80.0}


def target(kind: Measure, bound: float = 1.0, against: str = "") -> Target:
    return Target("kv_splice_", CASE, BF16, kind, bound, against)


def test_every_target_names_a_case_and_a_rival_that_is_there() -> None:
    known = peers()
    for (op, name, _), needed in jobs(TARGETS).items():
        assert case_of(op, name).name == name
        assert {n.split(",")[0] for n in needed} == set(offering(needed, known))


def test_a_share_of_a_time_is_a_most_and_all_else_a_least() -> None:
    assert target(Measure.SHARE, 0.02).met(0.02)
    assert not target(Measure.SHARE, 0.02).met(0.021)
    assert target(Measure.READ, 0.8).met(0.8)
    assert not target(Measure.READ, 0.8).met(0.79)
    assert not target(Measure.READ, 0.8).met(None)


def test_what_a_row_gives() -> None:
    rows = [replace(ROW, dtype="float32", median_s=9.0), ROW, RIVAL, replace(ROW, case=TAIL, median_s=50.0)]
    assert measure(target(Measure.LIMIT), rows, LIMITS) == 0.6
    assert measure(target(Measure.READ), rows, LIMITS) == 0.5
    assert measure(target(Measure.COPY), rows, LIMITS) == pytest.approx(1.2)
    assert measure(target(Measure.FASTER, against="llama.cpp"), rows, LIMITS) == 4.0
    assert measure(target(Measure.SHARE, against=TAIL), rows, LIMITS) == 0.04
    per_byte = measure(target(Measure.PER_BYTE, against="llama.cpp"), rows, LIMITS)
    assert per_byte == pytest.approx(4.0 * 100 / bytes_touched(case_of("kv_splice_", CASE), BF16))


def test_nothing_is_judged_by_a_row_without_a_time() -> None:
    wrong = [replace(ROW, median_s=None, error="wrong"), RIVAL]
    assert measure(target(Measure.LIMIT), wrong, LIMITS) is None
    assert measure(target(Measure.FASTER, against="torch"), [ROW, RIVAL], LIMITS) is None
    assert measure(target(Measure.SHARE, against=TAIL), [ROW], LIMITS) is None
    assert time_of(target(Measure.LIMIT), wrong) == "wrong"
    assert time_of(target(Measure.LIMIT), []) == ""


def test_the_other_case_of_a_share_is_run_too() -> None:
    wanted = jobs([target(Measure.SHARE, against=TAIL), target(Measure.FASTER, against="torch")])
    assert wanted == {("kv_splice_", CASE, BF16): {"torch"}, ("kv_splice_", TAIL, BF16): set()}


@pytest.mark.skipif(IMPLS["kv_splice_"]["cpu"].available() is not None, reason="no native library")
def test_a_short_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = Target("gist_pool", "SmolLM2-135M/N1", BF16, Measure.READ, 0.8)
    monkeypatch.setattr(check, "TARGETS", (small, replace(small, measure=Measure.FASTER, against="torch")))
    out = tmp_path / "targets.json"
    threads = torch.get_num_threads()
    try:
        result = CliRunner().invoke(app, ["--busy", "--seconds", "0.01", "--peers", "torch", "--out", str(out)])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    page = json.loads(out.read_text())
    assert [t["measured"] > 0 for t in page["targets"]] == [True, True]
    assert page["report"]["machine"]["threads"] == 1
    assert {r["backend"] for r in page["report"]["rows"]} >= {"cpu", "torch"}
    assert CliRunner().invoke(app, ["--op", "nothing"]).exit_code == 2
