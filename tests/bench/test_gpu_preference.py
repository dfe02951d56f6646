"""The table that `bench/gpu_check.py --write-preference` makes of its rows, without a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_cases import TINY

from bench.gpu.preference import note_key, save, seconds
from bench.rows import Report, Row
from bench.workloads import OPS
from mc_kernels.preference import BUCKETS, load, table
from mc_kernels.registry import IMPLS

TRITON = Row("lens_score", "a", "triton", "cuda", "bfloat16", 1, 1, median_s=4e-6, correct=True)
CUDA = replace(TRITON, backend="cuda", median_s=3e-6)
KEY = ("lens_score", "bfloat16", "E=256+ entries=1024+")
MACHINE = {"gpu": "a card", "cuda": "13.0", "torch": "2.13.0", "cpu": "not kept"}


def report(*rows: Row) -> Report:
    return Report("abc", "2030-01-01", MACHINE, {}, list(rows))


@pytest.mark.parametrize("op", OPS)
def test_a_case_has_the_key_that_its_calls_are_looked_up_by(op: str) -> None:
    """Nothing runs meanwhile: no Triton kernel takes fp64, and what is spliced in place stays as it was."""
    workload = OPS[op](TINY[op], torch.float64, torch.device("cpu"))
    keys: dict[Any, Any] = {}
    before = torch.get_rng_state()
    note_key(workload, keys)
    assert torch.equal(torch.get_rng_state(), before)
    assert list(keys) == ([(op, TINY[op].name)] if op in BUCKETS else [])
    assert all(key[:2] == (op, "float64") for key in keys.values())


def test_every_key_is_of_an_op() -> None:
    assert set(BUCKETS) <= set(IMPLS)


def test_two_backends_make_an_entry() -> None:
    keys = {("lens_score", "a"): KEY}
    want = {"lens_score": {"bfloat16": {KEY[2]: {"triton": {"device": 4e-6}, "cuda": {"device": 3e-6}}}}}
    assert seconds([TRITON, CUDA, replace(CUDA, case="b"), replace(TRITON, backend="torch")], keys) == want
    # One alone says nothing, unless the other's result is wrong.
    absent = replace(CUDA, median_s=None, correct=None, error="not available: no library")
    assert seconds([TRITON, absent], keys) == {}
    wrong = replace(TRITON, median_s=None, correct=False, error="wrong: error 1")
    assert seconds([wrong, CUDA], keys) == {"lens_score": {"bfloat16": {KEY[2]: {"cuda": {"device": 3e-6}}}}}
    assert seconds([wrong, absent], keys) == {}
    assert seconds([TRITON, CUDA], {}) == {}


def test_the_host_s_part_stands_beside_the_device_s() -> None:
    rows = [replace(TRITON, host_s=1e-6), replace(CUDA, waits=True)]
    want = {"triton": {"device": 4e-6, "host": 1e-6}, "cuda": {"device": 3e-6}}
    assert seconds(rows, {("lens_score", "a"): KEY})["lens_score"]["bfloat16"][KEY[2]] == want


def test_cases_of_one_bucket_count_together() -> None:
    """By ratios, so that the longer one does not decide alone."""
    keys = {("lens_score", "a"): KEY, ("lens_score", "b"): KEY}
    rows = [TRITON, CUDA, replace(TRITON, case="b", median_s=9e-6), replace(CUDA, case="b", median_s=27e-6)]
    assert seconds(rows, keys)["lens_score"]["bfloat16"][KEY[2]] == {
        "triton": {"device": 6e-6},
        "cuda": {"device": 9e-6},
    }


def test_an_op_in_place_is_found_by_its_row() -> None:
    key = ("kv_splice_", "bfloat16", "slots D=128 vectors=1024+")
    rows = [replace(r, op="kv_splice") for r in (TRITON, CUDA)]
    assert list(seconds(rows, {("kv_splice_", "a"): key})) == ["kv_splice_"]


def test_what_is_written_is_what_the_registry_reads(tmp_path: Path) -> None:
    path = tmp_path / "preference.json"
    assert save(path, report(TRITON, CUDA), {("lens_score", "a"): KEY}) == 1
    found = load(path)
    assert found.orders == {KEY: (("cuda", "triton"), ("cuda", "triton"))}
    assert found.measured == {
        "gpu": "a card", "cuda": "13.0", "torch": "2.13.0", "date": "2030-01-01", "commit": "abc",
    }  # fmt: skip
    assert path.read_text().endswith("}\n")


def test_without_measurements_the_table_stays(tmp_path: Path) -> None:
    path = tmp_path / "preference.json"
    assert save(path, report(TRITON), {("lens_score", "a"): KEY}) == 0
    assert not path.exists()
    assert table().measured is None
