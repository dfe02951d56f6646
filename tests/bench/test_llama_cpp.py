"""llama.cpp as a rival: its K-shift is applied and judged, keys drift as they must, a window decodes as it should."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.peers import llama_cpp as peer
from bench.plots import drift
from bench.workloads import OPS
from bench.workloads.base import PEER_ALLOWANCE, Candidate
from mc_kernels.kv_splice.cases import Case
from mc_kernels.rope import RopeSpec, apply_rope

CPU = torch.device("cpu")
needs_llama_cpp = pytest.mark.skipif(peer.missing(CPU) is not None, reason=str(peer.missing(CPU)))


def case(kind: str, **more: Any) -> Case:
    return Case(f"tiny/{kind}", 2, 3, 64, 120, kind=kind, **more)


def offered(kind: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> tuple[Any, Candidate]:
    workload = OPS["kv_splice_"](case(kind, **more), dtype, CPU)
    (candidate,) = peer.offers(workload)
    return workload, candidate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["collapse", "expand"])
@needs_llama_cpp
def test_the_shift_passes_its_check(kind: str, dtype: torch.dtype) -> None:
    workload, candidate = offered(kind, dtype)
    check = workload.check(candidate)
    assert 0 < check.error <= check.allowed * PEER_ALLOWANCE
    assert check.allowed < 0.02


@needs_llama_cpp
def test_every_call_shifts() -> None:
    workload, candidate = offered("collapse")
    shift = candidate.prepare(workload.inputs[0])
    start, before = shift.cache.keys([0, 1])
    found = []
    for _ in range(4):
        candidate.run(shift)
        found.append(shift.cache.keys([0, 1]))
    first, second = found[0], found[1]
    kept = (start < shift.start) | (start >= shift.start + shift.removed)
    assert first[0].tolist() == [p if p < shift.start else p - 31 for p in start[kept].tolist()]
    assert torch.equal(second[0], start[kept])
    tail = first[0] >= shift.start
    assert not torch.equal(first[1][:, tail], second[1][:, tail])
    torch.testing.assert_close(second[1], before[:, kept], atol=5e-3, rtol=0)
    assert torch.equal(found[2][0], first[0])
    assert torch.equal(found[3][0], start[kept])


@needs_llama_cpp
def test_a_shift_by_another_amount_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, candidate = offered("expand")
    wrong = lambda cache, begin, by: cache.lib.llama_memory_seq_add(cache.memory, 0, begin, -1, by + 1)  # noqa: E731
    monkeypatch.setattr(peer.KeyCache, "shift", wrong)
    assert workload.check(candidate).error == math.inf


@needs_llama_cpp
def test_a_shift_that_is_not_applied_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    workload, candidate = offered("expand")
    monkeypatch.setattr(peer.KeyCache, "apply", lambda cache: None)
    assert workload.check(candidate).reason(PEER_ALLOWANCE) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_judge_tells_one_position_from_the_next(dtype: torch.dtype) -> None:
    rope = RopeSpec.from_theta(1e5, 64, interleaved=True)
    before = torch.randn(2, 20, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    shifts = torch.where(torch.arange(20) < 7, 0, -31)
    after = apply_rope(before.transpose(1, 2), shifts, rope).transpose(1, 2)
    assert peer.judge(before, after, shifts, rope).reason() is None
    wrong = shifts.clone()
    wrong[13] += 1
    assert peer.judge(before, after, wrong, rope).reason(PEER_ALLOWANCE) is not None
    halves = RopeSpec.from_theta(1e5, 64)
    assert peer.judge(before, after, shifts, halves).reason(PEER_ALLOWANCE) is not None


def test_it_is_offered_for_one_ordered_edit_of_rotated_keys() -> None:
    kinds = [case("collapse", edits=2), case("mixed", edits=2), case("collapse", rope=False)]
    kinds += [case("collapse", discipline="slots", rope=False), case("collapse", batch=2)]
    for other in kinds:
        assert peer.offers(OPS["kv_splice_"](other, torch.float32, CPU)) == []
    (candidate,) = peer.offers(OPS["kv_splice_"](case("collapse"), torch.bfloat16, CPU))
    assert "inserts nothing" in candidate.note
    # All cells: 120 + 31 slots, rounded up to 256; read and written in fp16.
    assert peer.bytes_touched(case("collapse"), torch.bfloat16) == 2 * 2 * 3 * 64 * 256 * 2
    assert peer.bytes_touched(case("collapse"), torch.float32) == 2 * 2 * 3 * 64 * 256 * 4


def test_why_it_cannot_run() -> None:
    assert peer.missing(torch.device("cuda")) == "built for the CPU"
    if find_spec("llama_cpp") is None:
        assert "llama-cpp-python" in str(peer.missing(CPU))


@needs_llama_cpp
def test_what_llama_cpp_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeError, match=r"cannot load .*broken\.gguf: \w"):
        peer.Model(broken)


def test_drift() -> None:
    data = drift.measure(CPU, steps=(1, 60))
    series = data["series"]
    assert all(line["steps"] == [1, 60] for line in series.values())
    assert series[drift.SLOTS]["error"] == [0.0, 0.0]
    first, last = series[drift.BF16]["error"]
    assert 1e-3 < first < last < 0.1
    first, last = series[drift.FP32]["error"]
    assert 1e-8 < first < last < 1e-5
    assert (drift.SHIFT in series) != (drift.SHIFT in data["skipped"])
    if drift.SHIFT in series:
        first, last = series[drift.SHIFT]["error"]
        assert 1e-4 < first < last < 1e-2


def test_drift_ends_when_its_time_is_up() -> None:
    line = drift.measure(CPU, steps=(1, 10), seconds=0.0)["series"][drift.BF16]
    assert line == {"steps": [], "error": []}


@pytest.mark.parametrize("skipped", [{}, {drift.SHIFT: "not installed"}])
def test_drift_is_drawn(tmp_path: Path, skipped: dict[str, str]) -> None:
    pytest.importorskip("matplotlib")
    lines = {drift.BF16: [2e-3, 4e-3], drift.SLOTS: [0.0, 0.0]}
    series = {name: {"steps": [1, 10], "error": errors} for name, errors in lines.items()}
    drift.draw({"series": series, "skipped": skipped}, tmp_path / "drift.png")
    assert (tmp_path / "drift.png").read_bytes().startswith(b"\x89PNG")


@needs_llama_cpp
def test_a_window_decodes(tmp_path: Path) -> None:
    from bench.e2e import llama_cpp as e2e

    path = tmp_path / "model.gguf"
    peer.write_model(path, layers=2, kv_heads=2, head_dim=32, theta=1e4)
    prompt = [i % 32 for i in range(40)]
    found = e2e.measure(path, prompt, 5, 64, 1)
    assert len(found["tokens"]) == 6
    assert found["prefill_s"] > 0
    low, high = found["spread"]
    assert 0 < low <= found["ms_per_token"] <= high
    # Greedy: what was decoded token by token is what reading it at once predicts.
    window = e2e.Window(peer.Model(path), 64, 1, flash_attention=True)
    assert window.read([*prompt, *found["tokens"][:-1]]) == found["tokens"][-1]
    with pytest.raises(ValueError, match="expected 1 to 59 tokens, got 60"):
        e2e.measure(path, prompt + prompt[:20], 5, 64, 1)
