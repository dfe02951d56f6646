"""The tests' own instruments: each of them must be able to fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import context_attention
from mc_kernels.registry import IMPLS, Impl
from mc_kernels.testing import (
    GUARD_BYTE,
    Guarded,
    assert_within_error_rule,
    max_error,
    poison_,
    poisoned_empty,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison(dtype: torch.dtype) -> None:
    x = poison_(torch.zeros(3, dtype=dtype))
    assert x.isnan().all() if dtype.is_floating_point else (x == torch.iinfo(dtype).min).all()


def test_poisoned_empty_reaches_every_allocation() -> None:
    base = torch.zeros(2, 3)
    with poisoned_empty():
        made = [
            torch.empty(2, 3), torch.empty_like(base), torch.empty_strided((2, 3), (3, 1)), base.new_empty(4),
            base.new_empty_strided((2, 2), (2, 1)),
        ]  # fmt: skip
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
        assert torch.equal(torch.zeros(3), torch.tensor([0.0, 0.0, 0.0]))
        assert torch.equal(base + 1, torch.ones(2, 3))
    assert all(x.isnan().all() for x in made)


def test_poisoned_empty_reaches_inside_ops() -> None:
    """What an implementation allocates below the dispatcher is poisoned too; outside the context nothing is."""
    seen = []

    def forgetful(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(torch.empty(5))
        return torch.empty_like(q), q.new_empty(q.shape[:3]), q.new_empty(0)

    table = {**IMPLS["context_attention"], "ref": Impl("context_attention", "ref", forgetful)}
    q, pos = torch.zeros(1, 1, 2, 4), torch.zeros(1, 2, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(IMPLS, "context_attention", table)
        with poisoned_empty():
            out = context_attention(q, q, q, pos, pos, None, backend="ref")
    assert isinstance(out, Tensor)
    assert out.isnan().all()
    assert seen[0].isnan().all()


@pytest.mark.parametrize("raises", [False, True])
def test_poisoned_empty_restores_the_settings(raises: bool) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        with poisoned_empty():
            assert torch.are_deterministic_algorithms_enabled()
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert (torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory) == before


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guarded_holds_the_source(dtype: torch.dtype, gap: int) -> None:
    source = torch.arange(24).view(2, 3, 4).to(dtype)
    guarded = Guarded(source, gap=gap)
    assert torch.equal(guarded.view, source)
    assert guarded.view.stride() == (3 * (4 + gap), 4 + gap, 1)
    guarded.check()
    guarded.view.fill_(1)
    guarded.check()


@pytest.mark.parametrize("gap", [0, 3])
def test_guarded_catches_a_byte_anywhere_outside(gap: int) -> None:
    source = torch.zeros(2, 3, dtype=torch.float32)
    n_inside = 0
    size = Guarded(source, margin=4, gap=gap).bytes.numel()
    for i in range(size):
        guarded = Guarded(source, margin=4, gap=gap)
        guarded.bytes[i] ^= 0xFF
        if torch.equal(guarded.view.view(torch.int32), torch.zeros(2, 3, dtype=torch.int32)):
            with pytest.raises(AssertionError, match=f"guard byte {i} of {size}"):
                guarded.check()
        else:
            n_inside += 1
            guarded.check()
    assert n_inside == source.numel() * 4


def test_guarded_edges() -> None:
    for shape in ((0,), (0, 4), (3, 0), (2, 0, 4)):
        guarded = Guarded(torch.zeros(shape), gap=1)
        assert guarded.view.shape == shape
        assert (guarded.bytes == GUARD_BYTE).all()
        guarded.check()
    with pytest.raises(ValueError, match="source: expected at least one dimension"):
        Guarded(torch.tensor(1.0))


def test_max_error() -> None:
    nan, inf = float("nan"), float("inf")
    assert max_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])) == 0.5
    assert max_error(torch.tensor([nan]), torch.tensor([1.0])) == inf
    assert max_error(torch.tensor([1.0]), torch.tensor([nan])) == inf
    assert max_error(torch.tensor([nan]), torch.tensor([nan])) == 0
    assert max_error(torch.tensor([-inf]), torch.tensor([-inf])) == 0
    assert max_error(torch.tensor([-inf]), torch.tensor([inf])) == inf
    assert max_error(torch.tensor([-inf]), torch.tensor([0.0])) == inf
    assert max_error(torch.zeros(0), torch.zeros(0)) == 0
    assert max_error(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-20]).double()) == 2**-20


def test_error_rule_allows_twice_the_rival_and_one_rounding() -> None:
    oracle = torch.tensor([1.0, -4.0], dtype=torch.float64)
    plain = torch.tensor([1.0 + 2**-12, -4.0])
    rounding = 4 * 2**-23
    for error, ok in ((2**-11 + 0.9 * rounding, True), (2**-11 + 3 * rounding, False), (2**-10, False)):
        out = torch.tensor([1.0 + error, -4.0])
        if ok:
            assert_within_error_rule(out, oracle, plain)
        else:
            with pytest.raises(AssertionError, match="grad of k: error"):
                assert_within_error_rule(out, oracle, plain, what="grad of k")


def test_error_rule_when_the_rival_is_exact() -> None:
    oracle = torch.tensor([1.0, 3.0], dtype=torch.float64)
    one_rounding = torch.tensor([1.0, 3.0 + 2**-22])
    assert_within_error_rule(one_rounding, oracle, oracle.float())
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_error_rule(torch.tensor([1.0, 3.0 + 2**-20]), oracle, oracle.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_error_rule_refuses_what_is_not_finite(bad: float) -> None:
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="error inf"):
        assert_within_error_rule(torch.tensor([1.0, bad]), oracle, oracle.float())
    empty_rows = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert_within_error_rule(empty_rows.float(), empty_rows, empty_rows.float())


def test_error_rule_refuses_a_rival_that_failed() -> None:
    """A rival with NaN would allow any error."""
    oracle = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_within_error_rule(torch.tensor([1.0, 5.0]), oracle, torch.tensor([1.0, float("nan")]))


def test_error_rule_refuses_other_shapes() -> None:
    oracle = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_error_rule(torch.zeros(3, 2), oracle, oracle.float())
    with pytest.raises(AssertionError, match="shape"):
        assert_within_error_rule(torch.zeros(2, 3), oracle, torch.zeros(3))
    assert_within_error_rule(torch.zeros(0, 3), torch.zeros(0, 3).double(), torch.zeros(0, 3))
