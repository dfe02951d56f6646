"""The short cut through `kv_splice_`'s checks: it takes what is usual, and nothing that the checks would refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import Edit, SplicePlan, kv_splice_
from mc_kernels.kv_splice import checks
from mc_kernels.kv_splice.cases import CASES, SMALL
from mc_kernels.splicing import SplicePlan as Arrays

L, B, H, S, D, M = 3, 2, 2, 5, 4, 2


def new(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(L * B, H, M, D, dtype=dtype)


def usual(k: Tensor, v: Tensor, k_new: Tensor | None = None, v_new: Tensor | None = None) -> bool:
    return checks._usual(k, v, new(k.dtype) if k_new is None else k_new, new(k.dtype) if v_new is None else v_new)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_caches_as_engines_lay_them_out(dtype: torch.dtype) -> None:
    cache = torch.zeros(L, 2, B, H, S, D, dtype=dtype)
    assert usual(cache[:, 0], cache[:, 1])
    assert usual(cache[:, 1], cache[:, 0])
    assert usual(cache[:, 0, :, :, 1:], cache[:, 1, :, :, 1:])
    apart = torch.zeros(2, L * B, H, S, D, dtype=dtype)
    assert usual(apart[0], apart[1])
    shared = new(dtype)
    assert usual(cache[:, 0], cache[:, 1], shared, shared)


def test_the_benchmark_cases_take_it() -> None:
    for case in [c for c in CASES if c.length == 2048 and c.layers == 30] + SMALL:
        x = case.make(torch.bfloat16)
        assert checks._usual(x["k"], x["v"], x["k_new"], x["v_new"])


def _refusals() -> dict[str, tuple[Any, ...]]:
    cache = torch.zeros(L, 2, B, H, S, D)
    k, v = cache[:, 0], cache[:, 1]
    flat = torch.zeros(4096)
    over = flat.as_strided(k.shape, (16, 8, 4, 4, 1))
    inside = flat.as_strided(k.shape, k.stride())
    return {
        "one view": (k, k),
        "shifted by a slot": (flat.as_strided(k.shape, k.stride(), 0), flat.as_strided(k.shape, k.stride(), D)),
        "overlapping itself": (over, torch.zeros(4096).as_strided(k.shape, over.stride())),
        "other strides": (k, v.contiguous()),
        "other shape": (k, v[:, :, :, 1:]),
        "other dtype": (k, v.double()),
        "new of another dtype": (k, v, new(torch.float64)),
        "new within k": (inside, cache.clone()[:, 1], flat[: new().numel()].view(L * B, H, M, D)),
        "new with gaps": (k, v, torch.zeros(L * B, H, M, 2 * D)[..., :D]),
        "new of another shape": (k, v, new()[:5]),
        "new of one only": (k, v, new(), new()[:, :, :1]),
        "rows with gaps": (torch.zeros(L, B, H, S, 2 * D)[..., ::2], torch.zeros(L, B, H, S, 2 * D)[..., ::2]),
        "a gradient": (k, v, new().requires_grad_()),
        "integers": (k.int(), v.int(), new().int(), new().int()),
        "a parameter": (torch.nn.Parameter(k, requires_grad=False), v),
        "no slots": (k[:, :, :, :0], v[:, :, :, :0]),
        "meta": (k.to("meta"), v.to("meta"), new().to("meta"), new().to("meta")),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(_refusals()))
def test_all_else_is_left_to_the_checks(name: str) -> None:
    assert not usual(*_refusals()[name])


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_what_it_takes_shares_no_element(data: st.DataObject) -> None:
    """Against element numbers: small shapes, strides that are nested or not, views and new entries anywhere."""
    shape = [data.draw(st.integers(1, 3)) for _ in range(4)]
    strides, step = [1], shape[3]
    for n in reversed(shape[:3]):
        step += data.draw(st.integers(-1, 3))
        strides.insert(0, max(step, 1))
        step *= n
    numbers = torch.arange(4096, dtype=torch.float64)
    k, v = (numbers.as_strided(shape, strides, 1024 + data.draw(st.integers(-80, 80))) for _ in range(2))
    fresh = (shape[0], shape[1], data.draw(st.integers(1, 2)), shape[3])
    k_new = numbers[1024 + data.draw(st.integers(-150, 150)) :][: torch.Size(fresh).numel()].view(fresh)
    v_new = torch.zeros(fresh, dtype=torch.float64)
    if not checks._usual(k, v, k_new, v_new):
        return
    named = [x.flatten().tolist() for x in (k, v, k_new)]
    assert len({i for names in named for i in names}) == sum(len(names) for names in named)


def test_a_plan_holds_where_its_parts_end() -> None:
    plan = SplicePlan.from_edits(10, [Edit(2, 3, 1)], capacity=12, discipline="slots")
    assert isinstance(plan.arrays, Arrays)
    assert plan.offsets.tolist() == [[0] * 5, [plan.segments.shape[0], plan.stays.shape[0], 1, 10, 8]]
    k, v = torch.zeros(2, 1, 2, 12, 4)
    kv_splice_(k, v, torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4), plan)
    assert int(k.sum()) == 8
