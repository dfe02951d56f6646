"""The report of resources: what it calls a problem, its table, its exit status, and a run over one op."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mc_kernels import triton_report
from mc_kernels.triton_report import SHARED_LIMIT, Compilation, Resources, compile_all, main, table

ROW = Resources("gist_pool", "pool_kernel", "SmolLM2-135M", "D=64; 4 warps, 3 stages", 90, 128, 0, 36864)


def test_a_row_that_fits_is_no_problem() -> None:
    assert ROW.problem is None
    for capability, limit in SHARED_LIMIT.items():
        assert replace(ROW, capability=capability, shared_bytes=limit).problem is None


def test_spills_are_a_problem() -> None:
    assert replace(ROW, local_bytes=8).problem == "8 bytes of registers spilled per thread"


@pytest.mark.parametrize(("capability", "limit"), [(80, 166912), (90, 232448), (100, 232448)])
def test_too_much_shared_memory_is_a_problem(capability: int, limit: int) -> None:
    row = replace(ROW, capability=capability, shared_bytes=limit + 1)
    assert row.problem == f"{limit + 1} bytes of shared memory, limit {limit}"


def test_table_puts_architectures_side_by_side() -> None:
    rows = [
        ROW, replace(ROW, capability=80, registers=120), replace(ROW, shape="Llama-3-8B", local_bytes=16),
        replace(ROW, shape="Llama-3-8B", capability=80, shared_bytes=69632),
    ]  # fmt: skip
    lines = table(rows, "3.9.0").splitlines()
    assert lines[0] == "# What the Triton kernels take"
    assert lines[2].endswith("Triton 3.9.0.")
    start = lines.index(next(x for x in lines if x.startswith("| kernel")))
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines[start:]]
    assert cells[0][:3] == ["kernel", "shape", "configuration"]
    assert [x.split(":")[0] for x in cells[0][3:]] == ["sm_80", "sm_90"]
    assert set(lines[start + 1]) == {"|", "-"}
    assert cells[2] == [ROW.kernel, "SmolLM2-135M", ROW.configuration, "120 / 0 / 36864", "128 / 0 / 36864"]
    assert cells[3] == [ROW.kernel, "Llama-3-8B", ROW.configuration, "128 / 0 / 69632", "128 / 16 / 36864"]
    assert len(cells) == 4
    assert all(len(row) == 5 for row in cells)


def test_nothing_compiled_is_an_empty_table() -> None:
    assert table([], "3.9.0").splitlines()[-1].startswith("|---")
    assert list(compile_all([])) == []


def test_what_is_not_launched_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(op: str, one: Compilation, capability: int) -> Resources:
        return replace(ROW, shape=one.shape, capability=capability)

    def compilations() -> list[Compilation]:
        everywhere = Compilation("everywhere", None, {}, {}, 4)
        return [everywhere, replace(everywhere, shape="there", capabilities=(90,))]

    monkeypatch.setattr(triton_report, "compile_one", compiled)
    monkeypatch.setattr(importlib.import_module("mc_kernels.gist_pool.triton_kernel"), "compilations", compilations)
    rows = list(compile_all(["gist_pool"], [80, 90]))
    assert [(row.shape, row.capability) for row in rows] == [("everywhere", 80), ("everywhere", 90), ("there", 90)]
    assert table(rows, "3.9.0").splitlines()[-1].endswith("| - | 128 / 0 / 36864 |")


@pytest.mark.parametrize(("rows", "status"), [([ROW], 0), ([ROW, replace(ROW, local_bytes=4)], 1)])
def test_exit_status_and_where_it_writes(
    rows: list[Resources],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[Any] = []

    def compiled(ops: Sequence[str], capabilities: Sequence[int]) -> list[Resources]:
        asked.append((list(ops), list(capabilities)))
        return rows

    monkeypatch.setattr(triton_report, "compile_all", compiled)
    out = tmp_path / "table.md"
    assert main(["--ops", "gist_pool", "--capabilities", "90", "--out", str(out)]) == status
    assert asked == [(["gist_pool"], [90])]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ("4 bytes of registers spilled" in printed.err) == bool(status)
    assert out.read_text().count("pool_kernel") == 1
    assert main([]) == status
    assert "| pool_kernel | SmolLM2-135M |" in capsys.readouterr().out


@pytest.mark.slow
def test_one_op_compiles_without_a_problem(tmp_path: Path) -> None:
    """In a process of its own: the interpreter, which this one may have chosen, cannot compile."""
    out = tmp_path / "table.md"
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = ["--ops", "gist_pool", "--capabilities", "90", "--out", str(out)]
    command = [sys.executable, "-m", "mc_kernels.triton_report", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in out.read_text().splitlines() if re.search(r"\| \d+ / \d+ / \d+ \|$", line)]
    kernels = {row.split("|")[1].strip() for row in rows}
    assert kernels >= {"gist_pool_kernel", "backward_blocks_kernel", "collapse_kernel"}
    assert all(re.search(r"\| [1-9]\d* / 0 / \d+ \|$", row) for row in rows)
