"""compute-sanitizer over the CUDA tests: its command line and what its logs say, without the tool and without a GPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.gpu import check as gpu_check
from bench.gpu import sanitize
from bench.gpu.junit import Outcome as Ran
from bench.gpu.sanitize import KERNELS, TOOLS, Findings, command, find, missing, read_log, verdicts

CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
RACE_FREE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
OUTSIDE = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at void mc::cuda::splice<mc::cuda::Half>(mc::cuda::Call)+0x170
=========     by thread (3,0,0) in block (0,0,0)
=========     Access at 0x7f0 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x700 of size 240 bytes
=========
========= Invalid __global__ write of size 16 bytes
=========     at void mc::cuda::splice<mc::cuda::Half>(mc::cuda::Call)+0x170
=========     by thread (4,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at void mc::cuda::pool(mc::cuda::Call)+0x1b0
=========     and Read access at void mc::cuda::pool(mc::cuda::Call)+0x70 [12 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
# What it writes where nothing of CUDA ran.
NOTHING = "========= COMPUTE-SANITIZER\n========= Target application terminated before first instrumented API call\n"
PASSED = Ran(3, 0, ())


def test_the_command_line(tmp_path: Path) -> None:
    for tool in TOOLS:
        words = command("/x/compute-sanitizer", tool, tmp_path / "log")
        assert words[:3] == ["/x/compute-sanitizer", "--tool", tool]
        options = dict(zip(words[1::2], words[2::2], strict=True))
        assert options["--log-file"] == str(tmp_path / "log")
        assert options["--kernel-name"] == f"kernel_substring={KERNELS}"
    assert TOOLS == ("memcheck", "racecheck")


def test_all_our_kernels_are_watched() -> None:
    """As nvcc names a function of namespace mc::cuda; every kernel is in it."""
    mangled = subprocess.run(
        ["c++", "-x", "c++", "-S", "-o", "-", "-"], input="namespace mc { namespace cuda { void pool(int) {} } }",
        text=True, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert KERNELS in mangled
    csrc = Path(__file__).parents[2] / "csrc"
    kernels = [p for p in csrc.rglob("*.cu*") if "__global__" in p.read_text()]
    assert len(kernels) >= 5
    for path in kernels:
        text = path.read_text()
        assert "namespace mc::cuda {" in text[: text.index("__global__")], path


def test_what_logs_say() -> None:
    assert read_log(CLEAN) == read_log(RACE_FREE) == Findings(0)
    outside = read_log(OUTSIDE)
    kernel = "void mc::cuda::splice<mc::cuda::Half>(mc::cuda::Call)+0x170"
    assert outside == Findings(2, (f"Invalid __global__ write of size 16 bytes at {kernel}",))
    race = read_log(RACE)
    assert race.errors == 1
    assert len(race.first) == 1
    assert "Race reported between Write" in race.first[0]
    assert "and Read access" in race.first[0]
    for text, words in ((NOTHING, "before first instrumented API call"), ("", "an empty log")):
        found = read_log(text)
        assert found.errors == 0
        assert found.reason is not None
        assert words in found.reason


def test_nothing_that_is_wrong_is_passed_over() -> None:
    assert verdicts("memcheck", PASSED, read_log(CLEAN)) == []
    (line,) = verdicts("memcheck", PASSED, read_log(OUTSIDE))
    assert line.startswith("memcheck: 2 errors: Invalid __global__ write")
    assert verdicts("racecheck", Ran(1, 0, ("x::y",)), read_log(RACE_FREE)) == ["racecheck: test x::y"]
    (line,) = verdicts("racecheck", PASSED, read_log(NOTHING))
    assert "no summary" in line
    ended = Ran(0, 0, (), "the tests did not end within 9 s")
    assert verdicts("memcheck", ended, read_log("")) == ["memcheck: the tests did not end within 9 s"]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the tool's place: keeps its command line and a part of the environment, writes a log of the given text, and
    runs what comes behind its options. Two tests in place of the package's, one of them about a graph."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    path = home / "bin" / "compute-sanitizer"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, subprocess, sys\n"
        "words = sys.argv[1:]\n"
        "options, n = {}, 0\n"
        "while words[n].startswith('--'):\n"
        "    options[words[n]], n = words[n + 1], n + 2\n"
        f"home = pathlib.Path({str(home)!r})\n"
        "own = os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING')\n"
        "with (home / 'calls.json').open('a') as calls:\n"
        "    calls.write(json.dumps([options['--tool'], words[n:], own]) + '\\n')\n"
        "log = home / (options['--tool'] + '.txt')\n"
        "if log.exists():\n"
        "    pathlib.Path(options['--log-file']).write_text(log.read_text())\n"
        "subprocess.run(words[n:])\n"  # and no exit status, as where the tool could not connect
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    tests = home / "test_few.py"
    tests.write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_a(): pass\n\n@pytest.mark.gpu\ndef test_graph(): pass\n\n"
        "def test_elsewhere(): assert False\n"
    )
    monkeypatch.setattr(sanitize, "TESTS", str(tests))
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time of so few tests
    monkeypatch.setattr(sanitize, "missing", lambda: None)
    return home


def test_both_tools_run_the_tests(tool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fault of either is a failure. memcheck sees each tensor as an allocation and no graph."""
    (tool / "memcheck.txt").write_text(CLEAN)
    (tool / "racecheck.txt").write_text(RACE)
    failures = sanitize.sanitize(60)
    assert [line.split(":")[0] for line in failures] == ["racecheck"]
    calls = [json.loads(line) for line in (tool / "calls.json").read_text().splitlines()]
    assert [(name, own) for name, _, own in calls] == [("memcheck", "1"), ("racecheck", None)]
    assert all(words[:6] == [sys.executable, "-m", "pytest", "-q", "-m", "gpu"] for _, words, _ in calls)
    assert all(str(tool / "test_few.py") in words for _, words, _ in calls)
    assert "memcheck: 0 errors; tests: 1 passed, 0 skipped, 0 failed" in (said := capsys.readouterr().out)
    assert "racecheck: 1 errors; tests: 2 passed, 0 skipped, 0 failed" in said


def test_a_tool_that_says_nothing_is_a_failure(tool: Path) -> None:
    outcome, findings = sanitize.check("memcheck", 30, ["-k", "none of that name"])
    assert verdicts("memcheck", outcome, findings) == ["memcheck: no test ran"]
    outcome, findings = sanitize.check("memcheck", 30)
    assert verdicts("memcheck", outcome, findings) == ["memcheck: no summary: an empty log"]


def test_the_tool_is_looked_for(tool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find() == str(tool / "bin" / "compute-sanitizer")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{tool / 'bin'}{os.pathsep}{os.defpath}")
    assert find() == str(tool / "bin" / "compute-sanitizer")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_where_nothing_can_be_checked_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find", lambda: None)
    assert "no compute-sanitizer" in (missing() or "")
    assert sanitize.sanitize(60) == []
    assert "SKIPPED: compute-sanitizer: no compute-sanitizer" in capsys.readouterr().err
    monkeypatch.setattr(sanitize, "find", lambda: "/x")
    assert missing() == "no CUDA device"
    with pytest.raises(sanitize.typer.Exit) as ended:
        sanitize.main(1.0, None)
    assert ended.value.exit_code == 0
    assert "SKIPPED: compute-sanitizer: no CUDA device" in capsys.readouterr().err


def test_the_check_has_the_option() -> None:
    result = CliRunner().invoke(gpu_check.app, ["--help"], env={"COLUMNS": "200"})
    assert "--sanitize" in result.output
