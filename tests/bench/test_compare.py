"""`--compare`: a slower kernel is flagged, noise is not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_cases import install, slowed

from bench.compare import LEAST_CHANGE, Change, compare, comparison_table
from bench.rows import Report, Row

OP = "gist_pool"


def row(median: float | None = 1.0, spread: float = 0.0, fraction: float | None = 0.5, **more: Any) -> Row:
    """A row whose limit did not change unless `fraction` says so."""
    known: dict[str, Any] = {
        "op": OP, "case": "tiny", "backend": "cpu", "device": "cpu", "dtype": "bfloat16", "bytes": 1, "flops": 1,
    }  # fmt: skip
    return Row(**known | {"median_s": median, "spread": spread, "fraction_of_limit": fraction} | more)


def report(*rows: Row) -> Report:
    return Report("abc", "2026-01-01", {}, {}, list(rows))


def change(old: Row, new: Row) -> Change:
    (found,) = compare(report(new), report(old))
    return found


@pytest.fixture
def pool_cli(
    tiny_cli: Callable[..., Any], limits: Any, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[..., Any], list[float]]:
    """The command line on one op whose cpu backend sleeps for as long as the list's only element says. Limits are the
    same in every run: on tiny buffers a busy machine's would differ by a hundred times."""
    pause, measured = [0.01], limits.per_round
    monkeypatch.setattr(limits, "per_round", lambda *arguments: [1e-4] * len(measured(*arguments)))
    install(monkeypatch, OP, slowed(OP, lambda: pause[0]))
    return lambda *more: tiny_cli("--op", OP, "--backend", "cpu", *more), pause


def test_a_slower_kernel_is_flagged_from_end_to_end(
    pool_cli: tuple[Callable[..., Any], list[float]], tmp_path: Path
) -> None:
    run, pause = pool_cli
    old, slow = tmp_path / "old.json", tmp_path / "slow.json"
    assert run("--out", str(old)).exit_code == 0
    pause[0] = 0.2
    result = run("--compare", str(old), "--out", str(slow))
    assert result.exit_code == 1, result.output
    assert "slower" in result.output
    pause[0] = 0.0  # hundreds of times faster: limits measured on a busy machine differ several times themselves
    faster = run("--compare", str(slow))
    assert faster.exit_code == 0, faster.output
    assert "faster" in faster.output


def test_a_report_compared_with_itself_flags_nothing() -> None:
    same = report(row(), row(2.0, backend="ref"), row(3.0, 0.3, case="other"))
    changes = compare(same, same)
    assert len(changes) == 3
    assert not any(c.slower or c.faster for c in changes)
    assert all(c.ratio == 1.0 and c.against_limit == 1.0 for c in changes)


def test_the_noise_of_both_runs_is_respected() -> None:
    assert not change(row(spread=0.1), row(1.25, spread=0.2, fraction=0.4)).slower
    assert change(row(spread=0.1), row(1.35, spread=0.2, fraction=0.5 / 1.35)).slower
    assert not change(row(spread=0.2), row(1 / 1.25, spread=0.1, fraction=0.5 * 1.25)).faster
    assert change(row(spread=0.2), row(1 / 1.35, spread=0.1, fraction=0.5 * 1.35)).faster


def test_no_change_is_called_below_the_least() -> None:
    little = 1 + LEAST_CHANGE * 0.9
    assert not change(row(), row(little, fraction=0.5 / little)).slower
    more = 1 + LEAST_CHANGE * 1.1
    assert change(row(), row(more, fraction=0.5 / more)).slower


def test_a_slower_machine_is_no_slower_kernel() -> None:
    """Twice the time where the limit takes twice the time too; and the other way round."""
    assert not change(row(), row(2.0, fraction=0.5)).slower
    assert not change(row(), row(0.5, fraction=0.5)).faster
    assert not change(row(), row(1.0, fraction=0.25)).slower, "a limit that moved alone says nothing"


def test_what_has_no_time_any_more_is_slower() -> None:
    gone = change(row(), row(None, fraction=None, correct=False, error="wrong: error 1"))
    assert gone.slower
    assert gone.ratio == math.inf


def test_only_rows_of_ours_that_both_runs_timed_are_compared() -> None:
    old = report(row(), row(backend="torch", is_peer=True), row(None, backend="ref"), row(case="old only"))
    new = report(row(), row(9.0, backend="torch", is_peer=True), row(9.0, backend="ref"), row(case="new only"))
    assert [c.row.backend for c in compare(new, old)] == ["cpu"]


def test_another_dtype_or_cache_state_is_another_row() -> None:
    old = report(row(cache="cold (4 inputs in turn)"))
    assert compare(report(row(dtype="float32", cache="cold (4 inputs in turn)")), old) == []
    assert compare(report(row(cache="warm")), old) == []
    assert len(compare(report(row(cache="cold (5 inputs in turn)")), old)) == 1


def test_the_table_names_what_changed() -> None:
    from rich.console import Console

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    changes = compare(
        report(row(2.0, fraction=0.25), row(None, backend="ref", fraction=None, error="wrong: error 1")),
        report(row(), row(backend="ref")),
    )
    console.print(comparison_table(changes))
    text = console.export_text()
    assert text.count("slower") == 2
    assert "host" not in text
    assert "wrong: error 1" in text


def test_host_time_is_compared_and_decides_nothing() -> None:
    from rich.console import Console

    (change,) = compare(report(row(host_s=3e-4)), report(row(host_s=1e-4)))
    assert change.host_ratio == pytest.approx(3)
    assert not change.slower
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table([change]))
    assert "3.00" in console.export_text()


@pytest.mark.parametrize(
    "content",
    ["no json", "[]", "{}", json.dumps({"rows": [{"op": "x"}]}), json.dumps({"rows": 3}), json.dumps({"rows": []})],
    ids=["text", "a list", "empty", "other rows", "no rows", "no header"],
)
def test_a_wrong_file_is_one_clear_line(
    pool_cli: tuple[Callable[..., Any], list[float]], tmp_path: Path, content: str
) -> None:
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="expected a report"):
        Report.load(path)
    result = pool_cli[0]("--compare", str(path))
    assert result.exit_code == 2, "refused before anything is measured"
    assert "old.json" in result.output.replace("\n", "")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b""], ids=["not text", "empty file"])
def test_a_file_that_is_no_text_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected a report"):
        Report.load(path)


def test_a_missing_file_is_one_clear_line(pool_cli: tuple[Callable[..., Any], list[float]], tmp_path: Path) -> None:
    result = pool_cli[0]("--compare", str(tmp_path / "nothing.json"))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
