"""pytest in a process of its own, ended after a time, and what its JUnit report says."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.machine import ROOT


@dataclass(frozen=True)
class Outcome:
    """failed: names of failed tests. error: why there is no result, or None."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    error: str | None = None


def run_tests(
    limit: float, tests: Sequence[str] = (), under: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> Outcome:
    """`pytest -m gpu` of some tests or all, ended after `limit` seconds.

    under: words in front of the command, such as a tool that runs it. environment: instead of this process's.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [*under, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={report}", *tests]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=limit, capture_output=True, text=True, env=environment)
        except subprocess.TimeoutExpired:
            return Outcome(0, 0, (), f"the tests did not end within {limit:.0f} s")
        if not report.exists():
            return Outcome(0, 0, (), f"pytest made no report: {(done.stdout + done.stderr)[-500:]}")
        return read_tests(report)


def read_tests(report: Path) -> Outcome:
    """What a JUnit report says. No test at all is an error: it would look like success."""
    passed, skipped, failed = 0, 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    error = None if passed or failed else "no test ran"
    return Outcome(passed, skipped, tuple(failed), error)
