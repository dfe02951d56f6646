"""Caches of fp8 (e4m3): attention reads them with a scale a head, splices move their bytes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from attention_model import DTYPES, EXTRAS, model, small
from fp8_model import read, with_fp8
from splice_model import same_bits, splice_list
from torch import Tensor

from mc_kernels import BackendError, Edit, PageTable, RopeSpec, SplicePlan, context_attention, kv_splice_, registry
from mc_kernels.checks import FP8
from mc_kernels.context_attention.cases import SMALL, stored
from mc_kernels.testing import assert_within_error_rule

DECODE, PREFILL, FEATURES, _ = SMALL
EDITS = [Edit(2, 5, 1), Edit(10, 0, 3), Edit(20, 1, 2)]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_formula(case: Any, dtype: torch.dtype) -> None:
    args = with_fp8(small(case, dtype))
    got = context_attention(**args, **EXTRAS, backend="ref")
    want, plain = (model(**read(args, exact=exact), exact=exact) for exact in (True, False))
    for name, x, exact, rival in zip(("out", "lse", "mass"), got, want, plain, strict=True):
        assert x.dtype == (dtype if name == "out" or dtype == torch.float64 else torch.float32)
        assert_within_error_rule(x, exact, rival, what=name)


def test_a_head_is_stored_up_to_its_largest() -> None:
    x = torch.tensor([[[[3.0, -6.0]], [[0.5, 0.25]]]])
    data, scale = stored(x)
    assert data.dtype == FP8
    assert torch.equal(scale, torch.tensor([6.0, 0.5]) / 448)
    torch.testing.assert_close(data.float() * scale[:, None, None], x)


def test_one_scale_of_all() -> None:
    """A per-tensor scale is the same one for each head; scales are linear."""
    args = with_fp8(small(DECODE, torch.float32))
    args["k_scale"] = torch.tensor([0.01]).expand(2)
    want = context_attention(**args, backend="ref")
    args["v_scale"] = args["v_scale"] * 2
    torch.testing.assert_close(context_attention(**args, backend="ref"), 2 * want)
    assert isinstance(want, Tensor)


def test_who_serves(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels and Triton's read none: by themselves they leave it to the oracle, and say so; named they
    refuse."""
    monkeypatch.delenv(registry.ENV_BACKEND, raising=False)
    registry._log_fallback_once.cache_clear()
    args = with_fp8(small(DECODE, torch.bfloat16))
    with caplog.at_level(logging.WARNING, logger="mc_kernels"):
        got = context_attention(**args)
    assert same_bits(got, context_attention(**args, backend="ref"))
    reason = "it reads no float8_e4m3fn keys and values"
    assert [r.getMessage() for r in caplog.records] == [f"context_attention: cpu cannot serve ({reason}); using ref"]
    for backend in ("cpu", "triton"):
        with pytest.raises(BackendError, match=f"backend '{backend}' cannot serve: {reason}"):
            context_attention(**args, backend=backend)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k_scale": None}, ValueError, r"k_scale: expected a tensor \[Hkv\] with float8_e4m3fn .* got None"),
        ({"v_scale": None}, ValueError, r"v_scale: expected a tensor \[Hkv\] with float8_e4m3fn keys"),
        ({"v_scale": torch.ones(3)}, ValueError, r"v_scale: expected shape \[Hkv\] with Hkv=2, got"),
        ({"k_scale": torch.ones(2, dtype=torch.float64)}, TypeError, "k_scale: expected dtype float32, got float64"),
        ({"k_scale": 0.5}, TypeError, "k_scale: expected a tensor, got float"),
        ({"v_scale": torch.ones(2, device="meta")}, TypeError, "v_scale: expected device cpu as q, got"),
        ({"v": torch.zeros(2, 2, 37, 16)}, TypeError, "v: expected dtype float8_e4m3fn as k, got float32"),
        ({"k": torch.zeros(2, 2, 37, 16)}, TypeError, "v: expected dtype float32 as q, got float8_e4m3fn"),
        ({"q": torch.zeros(2, 6, 1, 16).to(FP8)}, TypeError, "q: expected dtype .*float64, got float8_e4m3fn"),
        ({"k": torch.zeros(2, 2, 37, 16).to(torch.float8_e5m2)}, TypeError, "k: expected dtype .*float8_e4m3fn, got"),
        ({"q": torch.zeros(2, 6, 1, 16, requires_grad=True)}, ValueError, "q: expected .* that requires no gradient"),
    ],
)  # fmt: skip
def test_arguments(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        context_attention(**{**with_fp8(small(DECODE, torch.float32)), **change})


def test_scales_belong_to_fp8() -> None:
    with pytest.raises(ValueError, match="k_scale: expected None with keys and values that are not float8_e4m3fn"):
        context_attention(**small(DECODE, torch.float32), k_scale=torch.ones(2))


def test_without_gradients_a_leaf_is_taken() -> None:
    args = with_fp8(small(DECODE, torch.float32))
    args["q"] = args["q"].clone().requires_grad_(True)
    with torch.no_grad():
        out = context_attention(**args, backend="ref")
    assert isinstance(out, Tensor)
    assert not out.requires_grad


def test_attention_compiles() -> None:
    args = with_fp8(small(FEATURES, torch.float32))

    def call(**kwargs: Any) -> Any:
        return context_attention(**args, **kwargs, backend="ref")

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert all(same_bits(x, y) for x, y in zip(compiled(**EXTRAS), call(**EXTRAS), strict=True))


def cache(size: tuple[int, ...], seed: int) -> Tensor:
    """fp8 of every byte, NaN too."""
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).view(FP8)


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
@pytest.mark.parametrize("backend", ["ref", "cpu", "triton"])
@pytest.mark.parametrize("dim", [6, 64])
def test_bytes_are_moved(dim: int, backend: str, discipline: str) -> None:
    """Interleaved keys and values of one cache, by whoever serves: the entries of the edited list, bit for bit."""
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton runs on the GPU here")
    size = 26
    both, new = cache((2, 2, 2, 30, dim), 1), cache((2, 2, 2, 6, dim), 2)
    k, v = both[:, 0], both[:, 1]
    plan = SplicePlan.from_edits(size, EDITS, capacity=30, discipline=discipline)
    before = both.clone()
    kv_splice_(k, v, new[0], new[1], plan, backend=backend)
    order = splice_list(range(size), EDITS, range(100, 106))
    for at, kept, fresh in ((k, before[:, 0], new[0]), (v, before[:, 1], new[1])):
        by_rank = at.view(torch.uint8)[:, :, plan.new_slots].view(FP8)
        for rank, entry in enumerate(order):
            want = fresh[:, :, entry - 100] if entry >= 100 else kept[:, :, entry]
            assert same_bits(by_rank[:, :, rank], want)


def test_pages_and_rows() -> None:
    pool = [cache((1, 5, 1, 4, 2), seed) for seed in (1, 2)]
    new = [cache((2, 1, 1, 2), seed) for seed in (3, 4)]
    pages = PageTable(torch.tensor([[3, 0], [4, 1]]), 4)
    plan = SplicePlan.from_edits(7, [Edit(1, 2, 1)], capacity=8)
    before = [x.clone() for x in pool]
    kv_splice_(*pool, *new, plan, rows=[-1, 0], pages=pages)
    for x, was, fresh in zip(pool, before, new, strict=True):
        kept = torch.cat((was.view(torch.uint8)[0, 4, 0], was.view(torch.uint8)[0, 1, 0]))
        want = torch.cat((kept[:1], fresh.view(torch.uint8)[1, 0], kept[3:7]))
        got = torch.cat((x.view(torch.uint8)[0, 4, 0], x.view(torch.uint8)[0, 1, 0]))
        assert torch.equal(got[:6], want)
        assert same_bits(x[:, [3, 0, 2]].contiguous(), was[:, [3, 0, 2]].contiguous())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope": RopeSpec.from_theta(1e4, 8)}, "rope: expected None for a float8_e4m3fn cache"),
        ({"k": cache((1, 1, 9, 9), 1)[..., :8]}, r"k: expected float8_e4m3fn entries that begin on 2 bytes .*strides"),
        ({"v": cache((1, 1, 9, 10), 1)[..., 1:9]}, "v: expected float8_e4m3fn entries that begin on 2 bytes"),
        ({"v_new": cache((1, 1, 1, 8), 1).float()}, "v_new: expected dtype float8_e4m3fn as k"),
    ],
)  # fmt: skip
def test_what_cannot_be_moved_is_refused(change: dict[str, Any], words: str) -> None:
    call = {"k": cache((1, 1, 9, 8), 1), "v": cache((1, 1, 9, 8), 2), "k_new": cache((1, 1, 1, 8), 3)}
    call = {**call, "v_new": cache((1, 1, 1, 8), 4), **change}
    before = {name: x.clone() for name, x in call.items() if isinstance(x, Tensor)}
    with pytest.raises((ValueError, TypeError), match=words):
        kv_splice_(**call, plan=SplicePlan.from_edits(9, [Edit(1, 2, 1)], capacity=9))
    assert all(same_bits(call[name], x) for name, x in before.items())


def test_odd_heads_are_refused() -> None:
    k, v, new = cache((1, 1, 4, 5), 1), cache((1, 1, 4, 5), 2), cache((1, 1, 0, 5), 3)
    with pytest.raises(ValueError, match="k: expected float8_e4m3fn entries that begin on 2 bytes"):
        kv_splice_(k, v, new, new, SplicePlan.from_edits(4, [Edit(1, 2, 0)], capacity=4))


def test_a_splice_compiles() -> None:
    plan = SplicePlan.from_edits(9, [Edit(1, 2, 1)], capacity=9)
    k, v, new = cache((1, 1, 9, 8), 1), cache((1, 1, 9, 8), 2), cache((1, 1, 1, 8), 3)
    want = k.clone(), v.clone()
    kv_splice_(*want, new, new, plan)
    torch._dynamo.reset()
    torch.compile(lambda k, v: kv_splice_(k, v, new, new, plan), fullgraph=True, backend="eager")(k, v)
    assert same_bits(k, want[0])
    assert same_bits(v, want[1])


def test_the_oracle_knows_every_value() -> None:
    """One visible slot: its values are the result. All 254 numbers of fp8, in fp32."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    v = codes[codes.float().isfinite()].view(1, 1, 1, 254)
    at, one = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1)
    out = context_attention(torch.zeros(1, 1, 1, 254), v, v, at, at, None, k_scale=one, v_scale=one / 4, backend="ref")
    assert isinstance(out, Tensor)
    assert torch.equal(out, v.float() / 4)
