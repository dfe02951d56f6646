"""The short cut through the checks of `context_attention` takes what is usual, and nothing that they would refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels.context_attention import checks
from mc_kernels.context_attention.cases import CASES

B, HQ, HKV, T, S, D = 2, 4, 2, 3, 5, 8


def call(dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, Any]:
    usual = {
        "q": torch.zeros(B, HQ, T, D, dtype=dtype),
        "k": torch.zeros(B, HKV, S, D, dtype=dtype),
        "v": torch.zeros(B, HKV, S, D, dtype=dtype),
        "q_pos": torch.zeros(B, T, dtype=torch.int64),
        "kv_pos": torch.zeros(B, S, dtype=torch.int64),
        "kv_bias": None,
    }
    return usual | changes


def full_checks(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checks, "_usual", lambda *_: False)
        checks.check_attention(**arguments, sigma=None, k_scale=None, v_scale=None, scale=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_calls_as_models_make_them(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = torch.zeros(B, 7, HKV, 2, D, dtype=dtype)
    slots = {"k": cache[..., 0, :].transpose(1, 2), "v": cache[..., 1, :].transpose(1, 2)}
    slots["kv_pos"] = torch.zeros(B, 7, dtype=torch.int32)
    for usual in (call(dtype), call(dtype, **slots), call(dtype, kv_bias=torch.zeros(B, S))):
        assert checks._usual(**usual)
        full_checks(usual, monkeypatch)


def test_the_benchmark_cases_take_it() -> None:
    for case in (case for case in CASES if case.slots <= 2048):
        x = case.make(torch.bfloat16)
        assert checks._usual(*(x[name] for name in ("q", "k", "v", "q_pos", "kv_pos")), None)


def _refusals() -> dict[str, dict[str, Any]]:
    return {
        "k of another dtype": call(k=torch.zeros(B, HKV, S, D, dtype=torch.bfloat16)),
        "fp8 q": call(torch.float8_e4m3fn),
        "integers": call(torch.int32),
        "three dimensions": call(q=torch.zeros(HQ, T, D)),
        "v of another shape": call(v=torch.zeros(B, HKV, S + 1, D)),
        "heads that do not divide": call(q=torch.zeros(B, 3, T, D)),
        "no KV heads": call(k=torch.zeros(B, 0, S, D), v=torch.zeros(B, 0, S, D)),
        "no dimensions": call(q=torch.zeros(B, HQ, T, 0), k=torch.zeros(B, HKV, S, 0), v=torch.zeros(B, HKV, S, 0)),
        "strided rows": call(k=torch.zeros(B, HKV, D, S).transpose(2, 3)),
        "float positions": call(q_pos=torch.zeros(B, T)),
        "positions of another batch": call(kv_pos=torch.zeros(1, S, dtype=torch.int64)),
        "bias of another shape": call(kv_bias=torch.zeros(B, S + 1)),
        "integer bias": call(kv_bias=torch.zeros(B, S, dtype=torch.int64)),
        "another device": call(kv_pos=torch.zeros(B, S, dtype=torch.int64, device="meta")),
        "q no tensor": call(q=[0]),
        "positions no tensor": call(q_pos=[0]),
    }


@pytest.mark.parametrize("name", _refusals())
def test_what_the_checks_refuse_meets_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = _refusals()[name]
    assert not checks._usual(**refused)
    with pytest.raises((TypeError, ValueError)):
        full_checks(refused, monkeypatch)


def _tensor(draw: st.DrawFn, sizes: list[int]) -> Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.int32]))
    shape = [draw(st.sampled_from([n, n, n, 1, 0, n + 1])) for n in sizes]
    x = torch.zeros(shape[::-1], dtype=dtype).permute(*range(len(shape) - 1, -1, -1))
    return x if draw(st.booleans()) else x.contiguous()


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_it_never_takes_what_the_checks_refuse(data: st.DataObject) -> None:
    drawn = call()
    for name in data.draw(st.sets(st.sampled_from(sorted(drawn)), max_size=3)):
        sizes = {"q": [B, HQ, T, D], "k": [B, HKV, S, D], "v": [B, HKV, S, D], "q_pos": [B, T]}.get(name, [B, S])
        drawn[name] = data.draw(st.composite(lambda draw, s=sizes: _tensor(draw, s))())
    if checks._usual(**drawn):
        with pytest.MonkeyPatch.context() as patch:
            full_checks(drawn, patch)
