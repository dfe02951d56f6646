"""The tests of the CUDA kernels under compute-sanitizer: `make cuda-sanitize`, or `bench/gpu_check.py --sanitize`.

memcheck looks for accesses outside an allocation and misaligned ones, racecheck for races in shared memory. (Races in
global memory are the emulation's part: tests/cuda_kernels.) Both watch our own kernels alone, by their namespace. Needs
a GPU and the tool, of CUDA's toolkit: where either is missing it says so and passes.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer

from mc_kernels import cuda_backend

from .junit import Outcome, run_tests

TOOLS = ("memcheck", "racecheck")
TESTS = "tests/cuda_kernels"
# A substring of the mangled names of all our kernels: namespace mc::cuda.
KERNELS = "2mc4cuda"
# Each tensor is an allocation of its own, so that one byte behind it is outside. A capture must not allocate so.
OWN_ALLOCATIONS = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
WITHOUT_CAPTURE = ("-k", "not graph")
_SUMMARY = re.compile(
    r"^=+ (?:ERROR SUMMARY: (?P<errors>\d+) errors?|RACECHECK SUMMARY: (?P<hazards>\d+) hazards? displayed.*)$", re.M
)
# A complaint's first line, and its second, which is set in.
_COMPLAINT = re.compile(r"^=+ (?P<what>\S.*)\n=+ {2,}(?P<where>\S.*)$", re.M)


def missing() -> str | None:
    """Why nothing can be checked here, or None."""
    if find() is None:
        return "no compute-sanitizer (CUDA's toolkit has it; CUDA_HOME names one)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return cuda_backend.available()


def find() -> str | None:
    """The tool: of the toolkit that the environment names, on the path, in the usual place."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    places = [*(f"{home}/bin" for home in homes), os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(executable: str, tool: str, log: Path) -> list[str]:
    """What stands before the tests' own command line. The log holds what the tool says of our kernels and no more: the
    tests answer for themselves, so torch's refused calls and pytest's exit status are not its business."""
    return [
        executable, "--tool", tool, "--kernel-name", f"kernel_substring={KERNELS}", "--log-file", str(log),
        "--report-api-errors", "no", "--require-cuda-init", "no", "--check-exit-code", "no", "--launch-timeout", "120",
    ]  # fmt: skip


@dataclass(frozen=True)
class Findings:
    """errors: how many the tool counts. first: some of them in its words. reason: why that is no result, or None."""

    errors: int
    first: tuple[str, ...] = ()
    reason: str | None = None


def read_log(text: str) -> Findings:
    """What a log says. A tool that saw no kernel, or that was ended, gives no summary: that is no success."""
    summaries = list(_SUMMARY.finditer(text))
    errors = sum(int(found["errors"] or found["hazards"]) for found in summaries)
    first = tuple(dict.fromkeys(f"{m['what']} {m['where']}" for m in _COMPLAINT.finditer(text)))[:3]
    reason = None if summaries else f"no summary: {text.strip()[-300:] or 'an empty log'}"
    return Findings(errors, first, reason)


def check(tool: str, limit: float, more: Sequence[str] = ()) -> tuple[Outcome, Findings]:
    """The tests under one tool, ended after `limit` seconds."""
    executable = find()
    if executable is None:
        raise RuntimeError(missing())
    environment: Mapping[str, str] = os.environ | (OWN_ALLOCATIONS if tool == "memcheck" else {})
    tests = [TESTS, *(WITHOUT_CAPTURE if tool == "memcheck" else ()), *more]
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        outcome = run_tests(limit, tests, command(executable, tool, log), environment)
        return outcome, read_log(log.read_text(errors="replace") if log.exists() else "")


def verdicts(tool: str, outcome: Outcome, findings: Findings) -> list[str]:
    """What is wrong, one line each; empty: nothing is."""
    out = [f"{tool}: test {name}" for name in outcome.failed]
    out += [f"{tool}: {outcome.error}"] if outcome.error else []
    if findings.errors:
        out.append(f"{tool}: {findings.errors} errors: {'; '.join(findings.first) or 'none of them in its log'}")
    # Where the tests were ended the tool was too.
    return out + ([f"{tool}: {findings.reason}"] if findings.reason and not outcome.error else [])


def sanitize(seconds: float, more: Sequence[str] = ()) -> list[str]:
    """All tools within about `seconds`; what is wrong. Says what it did; SKIPPED where nothing can be checked."""
    reason = missing()
    if reason is not None:
        print(f"SKIPPED: compute-sanitizer: {reason}", file=sys.stderr)
        return []
    failures = []
    for tool in TOOLS:
        outcome, findings = check(tool, seconds / len(TOOLS), more)
        print(
            f"{tool}: {findings.errors} errors; tests: {outcome.passed} passed, {outcome.skipped} skipped,"
            f" {len(outcome.failed)} failed"
        )
        failures += verdicts(tool, outcome, findings)
    return failures


def main(
    minutes: Annotated[float, typer.Option(help="The whole run ends in about this time.")] = 30.0,
    tests: Annotated[list[str] | None, typer.Argument(help="Further arguments of pytest.")] = None,
) -> None:
    """Run the tests of the CUDA kernels under compute-sanitizer."""
    failures = sanitize(60 * minutes, tests or ())
    for line in failures:
        print(line, file=sys.stderr)
    raise typer.Exit(1 if failures else 0)


if __name__ == "__main__":
    typer.run(main)
