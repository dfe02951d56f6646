"""pytest in processes of its own, ended after a time, and what its JUnit report says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.machine import ROOT

# What pytest has, of the seconds that it may take, to write its report when it is interrupted.
GRACE = 15.0


@dataclass(frozen=True)
class Outcome:
    """failed: names of failed tests. error: why there is no result, or None."""

    passed: int
    skipped: int
    failed: tuple[str, ...]
    error: str | None = None


def run_tests(
    limit: float,
    tests: Sequence[str] = (),
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    processes: int = 1,
) -> Outcome:
    """`pytest -m gpu` of some tests or all, ended after `limit` seconds: what had run by then is in the outcome.

    under: words in front of the command, such as a tool that runs it. environment: instead of this process's.
    processes: that share the tests. A first run compiles some hundred specialisations of the Triton kernels, about a
        second of a core each: one process would not end in time.
    """
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [*under, sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--numprocesses={processes}", "--dist=worksteal"] if processes > 1 else []
        command += [f"--junitxml={report}", *tests]
        ended, printed = _run(command, limit, environment)
        late = None if ended else f"the tests did not end within {limit:.0f} s"
        if not report.exists():
            return Outcome(0, 0, (), late or f"pytest made no report: {printed[-500:]}")
        outcome = read_tests(report)
        return replace(outcome, error=late) if late else outcome


def _run(command: Sequence[str], limit: float, environment: Mapping[str, str] | None) -> tuple[bool, str]:
    """Whether the command came to its end by itself, and what it printed. None of its processes outlives this."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            return True, process.communicate(timeout=max(limit - GRACE, 0.0))[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                return False, process.communicate(timeout=GRACE)[0]
            except subprocess.TimeoutExpired:
                return False, ""
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


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
