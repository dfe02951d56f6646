"""A result is checked before it is timed: whatever a kernel gets wrong shows as an error and never as a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from small_cases import OTHERS, TINY, install, spoilt
from torch import Tensor

from bench import cli, suite
from bench.dtypes import DTYPES
from bench.limits import Limits
from bench.peers import peers, torch_eager
from bench.rows import Row
from bench.suite import Options, plan_cache, run_case
from bench.workloads import OPS, Candidate, Workload
from bench.workloads.base import PEER_ALLOWANCE, Check, error_rule
from mc_kernels.registry import IMPLS, PREFERENCE

CPU = torch.device("cpu")
FIGURES = ("median_s", "spread", "limit_s", "fraction_of_limit", "fraction_at_rows", "peer", "peer_ratio")


def options(dtype: torch.dtype = torch.float32, *backends: str) -> Options:
    # Warm: rotation would make thousands of copies of inputs this small.
    return Options(CPU, dtype, backends, seconds=0.01, warm=True)


def rows_of(op: str, limits: Limits, *backends: str, peers: dict[str, ModuleType] | None = None) -> dict[str, Row]:
    rows = run_case(op, TINY[op], options(torch.float32, *backends), limits, peers or {})
    return {row.backend: row for row in rows}


def rejected(row: Row) -> str:
    """The error text of a row that must have no figure."""
    assert row.correct is False
    assert [getattr(row, name) for name in FIGURES] == [None] * len(FIGURES)
    assert row.runs == 0
    assert row.error
    return row.error


def add_one(x: Tensor) -> None:
    x[(-1,) * (x.dim() - 2) + (0, 0)] += 1.0


def leave_nan(x: Tensor) -> None:
    x[(-1,) * (x.dim() - 2) + (0, 0)] = math.nan


def test_every_op_is_covered() -> None:
    assert {op for op in IMPLS if not op.endswith("_backward")} == set(OPS) == set(TINY)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_right_kernels_get_times(op: str, dtype: torch.dtype, limits: Limits) -> None:
    rows = run_case(op, TINY[op], options(dtype), limits, {"torch": torch_eager})
    tuned = ["torch, tuned"] if op in torch_eager.TUNED_OPS else []
    assert [row.backend for row in rows] == [*(b for b in IMPLS[op] if b in PREFERENCE["cpu"]), "torch", *tuned]
    for row in rows:
        assert row.correct, row.error
        assert row.error is None
        assert row.op == op.removesuffix("_")
        assert row.dtype == str(dtype).removeprefix("torch.")
        assert 0 < row.median_s < math.inf
        # Not that it is below 1: in fp16 torch's product, the probe, is slower on a CPU than widening first.
        assert 0 < row.limit_s < math.inf
        assert 0 < row.fraction_of_limit < math.inf
        assert row.runs >= 5
        assert row.bytes == TINY[op].bytes(dtype)
        assert row.flops == TINY[op].flops()


@pytest.mark.parametrize("name", OTHERS)
def test_right_kernels_get_times_in_other_cases(name: str, limits: Limits) -> None:
    rows = run_case(name.split()[0], OTHERS[name], options(), limits, {"torch": torch_eager})
    assert all(row.correct for row in rows), [row.error for row in rows]


@pytest.mark.parametrize("op", OPS)
def test_one_wrong_element_is_rejected(op: str, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, op, spoilt(op, add_one))
    rows = rows_of(op, limits, peers={"torch": torch_eager})
    assert "wrong: error" in rejected(rows["cpu"])
    assert rows["cpu"].max_error == pytest.approx(1.0, rel=0.2)
    assert rows["ref"].correct, "the neighbours' figures stay"
    assert rows["ref"].median_s
    assert rows["torch"].median_s


@pytest.mark.parametrize("op", OPS)
def test_nan_is_rejected(op: str, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, op, spoilt(op, leave_nan))
    row = rows_of(op, limits, "cpu")["cpu"]
    assert "wrong: error inf" in rejected(row)
    assert row.max_error == math.inf


@pytest.mark.parametrize("op", OPS)
def test_what_a_kernel_raises_is_shown(op: str, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such instruction: vfoo\nsecond line")

    install(monkeypatch, op, broken)
    rows = rows_of(op, limits)
    assert "no such instruction: vfoo" in rejected(rows["cpu"])
    assert "\n" not in rejected(rows["cpu"])
    assert rows["ref"].median_s, "one broken kernel does not end the run"


def splice(change: Callable[[tuple[Any, ...], Callable[..., Any]], None]) -> Callable[..., None]:
    reference = IMPLS["kv_splice_"]["ref"].fn
    return lambda *args: change(args, reference)


def before_the_edit(args: tuple[Any, ...], reference: Callable[..., Any]) -> None:
    reference(*args)
    args[1][0, ..., 0, :] = 0.0  # values of the first slot, which no edit touches


def behind_the_tail(args: tuple[Any, ...], reference: Callable[..., Any]) -> None:
    reference(*args)
    n = TINY["kv_splice_"].plan.new_length
    args[0][..., n - 1, :] = args[0][..., n - 2, :]  # one entry too far


def keys_only(args: tuple[Any, ...], reference: Callable[..., Any]) -> None:
    k, v = args[0], args[1].clone()
    reference(k, v, *args[2:])


@pytest.mark.parametrize(
    "change",
    [lambda args, reference: None, before_the_edit, behind_the_tail, keys_only],
    ids=["does nothing", "writes before the edit", "overruns the tail", "moves only keys"],
)
def test_splice_that_spoils_the_cache_is_rejected(
    change: Callable[..., None], limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, "kv_splice_", splice(change))
    assert "wrong: error" in rejected(rows_of("kv_splice_", limits, "cpu")["cpu"])


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("kv_splice_")])
def test_a_splice_is_not_helped_by_the_one_before(name: str, limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slots a second splice of the same plan and entries changes nothing: inputs must not be those that another
    candidate has already spliced, or a kernel that does nothing is right."""
    install(monkeypatch, "kv_splice_", lambda *args: None)
    rows = run_case("kv_splice_", OTHERS[name], options(), limits, {"torch": torch_eager})
    assert [row.backend for row in rows] == ["ref", "cpu", "torch"]
    assert "wrong: error" in rejected(rows[1])


def test_wrong_shape_is_rejected(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = IMPLS["lens_score"]["ref"].fn
    install(monkeypatch, "lens_score", lambda *args: reference(*args)[:-1])
    assert rejected(rows_of("lens_score", limits, "cpu")["cpu"])


def test_a_backend_that_cannot_run_says_why(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "gist_pool", lambda *args: None, "cpu", available=lambda: "no compiler")
    row = rows_of("gist_pool", limits)["cpu"]
    assert row.error == "not available: no compiler"
    assert row.correct is None, "it is neither right nor wrong"
    assert row.median_s is None


def test_a_backend_that_cannot_take_the_case_says_why(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "gist_pool", lambda *args: None, supports=lambda *args: "needs AVX-512")
    row = rows_of("gist_pool", limits)["cpu"]
    assert row.median_s is None
    assert "needs AVX-512" in (row.error or "")


def peer(*candidates: Candidate) -> dict[str, ModuleType]:
    module = ModuleType("rival")
    module.offers = lambda workload: list(candidates)  # type: ignore[attr-defined]
    return {"rival": module}


def test_best_peer_and_ratio_come_from_right_rows(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fastest of all is a wrong peer; of the right ones the best counts."""
    times = {"ref": 4.0, "torch": 3.0, "twin": 8.0, "wrong": 1.0}

    def interleave(bursts: list[Any], device: Any, *, seconds: float, **_: Any) -> list[Any]:
        assert "wrong" not in named, "a wrong candidate is not even timed"
        probes = len(bursts) - len(named)
        samples = [[1.0] * 3] * probes + [[times[name] * r for r in (1, 2, 10)] for name in named]
        return [suite.Timed(tuple(s), 1) for s in samples]

    task: Workload = OPS["gist_pool"](TINY["gist_pool"], torch.float32, CPU)
    rivals = peer(
        Candidate("torch", task.plain, result=task.result),
        Candidate("twin", task.plain, result=task.result),
        Candidate("wrong", lambda x: tuple(y * 2 for y in task.plain(x))),
    )
    named = ["ref", "torch", "twin"]
    monkeypatch.setattr(suite, "interleave", interleave)
    monkeypatch.setattr(Limits, "matrix_rate", lambda *args: 1e12)
    rows = rows_of("gist_pool", limits, "ref", peers=rivals)
    assert rows["ref"].peer == "torch"
    assert rows["ref"].peer_ratio == pytest.approx(3.0 / 4.0), "above 1 would mean that ours is faster"
    assert rejected(rows["wrong"])
    assert rows["torch"].peer is None
    assert rows["torch"].peer_ratio is None


def test_no_peer_no_ratio(limits: Limits) -> None:
    row = rows_of("gist_pool", limits, "ref")["ref"]
    assert row.median_s
    assert row.peer is None
    assert row.peer_ratio is None


def test_a_peer_may_err_more_than_ours_but_not_without_bound() -> None:
    check = Check(error=2.0, allowed=1.0)
    assert check.reason() is not None
    assert check.reason(PEER_ALLOWANCE) is None
    assert Check(error=1.01 * PEER_ALLOWANCE, allowed=1.0).reason(PEER_ALLOWANCE) is not None
    assert Check(error=math.nan, allowed=1.0).reason(PEER_ALLOWANCE) is not None


def test_the_largest_error_is_recorded() -> None:
    """Also where the rule lets it pass."""
    exact = torch.ones(4, dtype=torch.float64)
    check = error_rule([exact.float() + 1e-3], [exact], [exact.float() + 1e-3])
    assert check.error == pytest.approx(1e-3, rel=1e-3)
    assert check.reason() is None


def test_of_several_outputs_the_worst_by_its_own_rule_decides() -> None:
    """Large numbers may err more in absolute terms: a small output that is far off must not hide behind them."""
    large, small = torch.full((4,), 1e6, dtype=torch.float64), torch.full((4,), 1e-3, dtype=torch.float64)
    plain = [large.float() + 1.0, small.float() + 1e-9]
    check = error_rule([large.float() + 4.0, small.float() * 1.5], [large, small], plain)
    assert check.reason(PEER_ALLOWANCE) is not None


def test_cold_inputs_exceed_the_cache_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "last_level_cache", lambda device: 1 << 20)
    case = TINY["gist_pool"]
    plan = plan_cache("gist_pool", case, Options(CPU, torch.float32))
    assert plan.copies * case.bytes(torch.float32) >= suite.ROTATIONS[0] << 20
    assert (plan.copies - 1) * case.bytes(torch.float32) < suite.ROTATIONS[0] << 20
    assert not plan.flush
    assert plan.label.startswith("cold")
    large = replace(case, blocks=20_000)
    assert plan_cache("gist_pool", large, Options(CPU, torch.float32)).copies == 1
    # A splice in slots touches little of a large cache: copies would not fit, so the cache is flushed.
    slots = replace(OTHERS["kv_splice_ slots"], length=1 << 16)
    assert plan_cache("kv_splice_", slots, Options(CPU, torch.float32)).flush
    warm = plan_cache("gist_pool", case, Options(CPU, torch.float32, warm=True))
    assert (warm.copies, warm.flush, warm.label) == (1, False, "warm")


def test_rotating_inputs_differ() -> None:
    for op, case in TINY.items():
        first, second = OPS[op](case, torch.float32, CPU, copies=2).inputs
        pick: Callable[[Any], Tensor] = lambda x: next(iter(x.values())) if isinstance(x, dict) else x[0]  # noqa: E731
        assert not torch.equal(pick(first), pick(second))


def test_cli_exits_0_when_all_is_right(tiny_cli: Callable[..., Any]) -> None:
    result = tiny_cli("--peers", "torch")
    assert result.exit_code == 0, result.output


def test_cli_exits_1_on_a_wrong_result_and_still_reports(
    tiny_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, "lens_score", spoilt("lens_score", add_one))
    out = tmp_path / "report.json"
    result = tiny_cli("--out", str(out))
    assert result.exit_code == 1, result.output
    rows = {(row.op, row.backend): row for row in cli.Report.load(out).rows}
    assert "wrong: error" in rejected(rows["lens_score", "cpu"])
    assert rows["lens_score", "ref"].median_s


def test_a_wrong_peer_does_not_fail_the_run(tiny_cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_eager, "offers", lambda workload: [Candidate("torch", lambda x: 1 / 0)])
    result = tiny_cli("--peers", "torch")
    assert result.exit_code == 0, result.output
    assert "ZeroDivisionError" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nonsense"], "nonsense"),
        (["--shape", "no-such-shape"], "no-such-shape"),
        (["--dtype", "fp8"], "fp8"),
        (["--peers", "nobody"], "nobody"),
        (["--out", "report.txt"], "report.txt"),
        (["--device", "tpu"], "tpu"),
        (["--device", "meta"], "meta"),
        (["--seconds", "0"], "--seconds"),
        (["--seconds", "nan"], "nan"),
    ],
)
def test_cli_names_what_it_cannot_take(tiny_cli: Callable[..., Any], arguments: list[str], message: str) -> None:
    result = tiny_cli(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_every_peer_module_keeps_the_contract() -> None:
    found = peers()
    assert {"torch", "liger", "fla", "flashinfer", "flash-attn"} <= set(found)
    for name, module in found.items():
        assert name == module.NAME
        reason = module.missing(CPU)
        assert reason is None or reason
        if reason is None:
            for op, case in TINY.items():
                assert isinstance(module.offers(OPS[op](case, torch.float32, CPU)), list)


def test_a_backend_that_an_op_lacks_is_named(limits: Limits) -> None:
    (row,) = run_case("fused_linear", TINY["fused_linear"], options(torch.float32, "cuda"), limits, {})
    assert row.backend == "cuda"
    assert row.error == "not available: not implemented for this op"
    assert row.median_s is None


def test_a_peer_that_cannot_make_its_offer_ends_nothing(limits: Limits) -> None:
    def broken(_: Any) -> Any:
        raise OSError("no such library")

    peer = SimpleNamespace(NAME="broken", offers=broken)
    rows = {row.backend: row for row in run_case("gist_pool", TINY["gist_pool"], options(), limits, {"broken": peer})}
    assert rows["broken"].error == "not available: OSError: no such library"
    assert rows["broken"].is_peer
    assert rows["ref"].median_s


def test_a_case_that_does_not_fit_is_not_begun(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "available_memory", lambda _: 1000)
    (row,) = run_case("gist_pool", TINY["gist_pool"], options(), limits, {})
    assert row.error is not None
    assert row.error.startswith("needs about")
    assert row.correct is None


def test_a_refusal_is_no_wrong_result(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend need not take every case: its row has the reason, and nothing failed."""
    op = "context_attention"
    install(monkeypatch, op, IMPLS[op]["ref"].fn, supports=lambda *_: "too many rows")
    row = rows_of(op, limits, "cpu")["cpu"]
    assert row.correct is None
    assert row.median_s is None
    assert row.error == f"not available: {op}: backend 'cpu' cannot serve: too many rows"


def test_an_fp8_cache_is_judged_by_what_it_stands_for(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the bytes, and torch's plain code, which widens it first, is its one rival."""
    op = "context_attention"
    case = replace(TINY[op], name="tiny/fp8", fp8=True)
    rivals = {"torch": torch_eager, "other": SimpleNamespace(offers=lambda _: pytest.fail("asked"))}
    rows = run_case(op, case, options(torch.bfloat16, "ref", "cpu"), limits, rivals)  # type: ignore[arg-type]
    found = {row.backend: row for row in rows}
    assert set(found) == {"ref", "cpu", "torch"}
    assert found["ref"].correct
    assert found["torch"].correct
    assert "reads no float8_e4m3fn" in (found["cpu"].error or "")
    cache = 2 * case.kv_heads * case.slots * case.head_dim
    assert TINY[op].bytes(torch.bfloat16) - case.bytes(torch.bfloat16) == cache - 8 * case.kv_heads
    reference = IMPLS[op]["ref"].fn
    for at in (12, 13):  # a wrong scale, of keys and of values
        install(
            monkeypatch, op, lambda *args, at=at: reference(*args[:at], args[at] * 1.1, *args[at + 1 :])
        )  # fmt: skip
        (row,) = run_case(op, case, options(torch.bfloat16, "cpu"), limits, {})
        assert "wrong: error" in rejected(row)
