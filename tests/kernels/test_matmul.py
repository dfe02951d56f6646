"""The library's matrix product at every instruction set level: sums, tails, what is not written, subnormal numbers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import extension, native
from mc_kernels.testing import Guarded, poison_

LEVELS = native.isa_levels()
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
BF16_LEVELS = [name for name in LEVELS if name in ("amx-emulated", "avx512bf16", "amx", "neonbf16")]
# Of every level fp32, of those that have it bf16.
PRODUCTS = [(name, torch.float32) for name in LEVELS] + [(name, torch.bfloat16) for name in BF16_LEVELS]


class View(ctypes.Structure):
    """`mc_tensor` of mc_kernels.h."""

    _fields_ = [
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("size", ctypes.c_int64 * 5), ("stride", ctypes.c_int64 * 5),
    ]  # fmt: skip


def view(x: Tensor) -> View:
    address, dtype, sizes, strides = native.view(x)
    return View(address, dtype, len(sizes), (ctypes.c_int64 * 5)(*sizes), (ctypes.c_int64 * 5)(*strides))


@pytest.fixture(autouse=True, scope="module")
def _level_afterwards() -> Iterator[None]:
    yield
    native.library().set_cpu_isa(None)


def product(a: Tensor, w: Tensor, c: Tensor, *, level: str, add: bool = False) -> None:
    """c (+)= a w^T through the library's own entry, which its header does not show."""
    native.library().set_cpu_isa(level)
    library = ctypes.CDLL(next(str(p) for p in extension.FOLDER.glob("libmc_kernels.*")))
    library.mc_last_error.restype = ctypes.c_char_p
    status = library.mc_probe_matmul(*(ctypes.byref(view(x)) for x in (a, w, c)), int(add))
    assert status == 0, library.mc_last_error()


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("level", "dtype"), PRODUCTS, ids=str)
@settings(max_examples=60, deadline=None)
@given(
    m=st.one_of(st.integers(0, 70), st.sampled_from([14, 15, 16, 17, 31, 32, 33, 48, 64])),
    n=st.one_of(st.integers(0, 70), st.sampled_from([15, 16, 17, 31, 32, 33, 64])),
    k=st.one_of(st.integers(0, 130), st.sampled_from([31, 32, 33, 64])),
    gap=st.integers(0, 5),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_product(level: str, dtype: torch.dtype, m: int, n: int, k: int, gap: int, add: bool, seed: int) -> None:
    a, w = normal(m, k + gap, dtype=dtype, seed=seed)[:, :k], normal(n, k, dtype=dtype, seed=seed + 1)
    before = normal(m, n, dtype=torch.float32, seed=seed + 2)
    c = Guarded(before if add else poison_(before.clone()), gap=gap)
    product(a, w, c.view, level=level, add=add)
    c.check()
    exact = a.double() @ w.double().T + (before.double() if add else 0)
    size = a.double().abs() @ w.double().abs().T + (before.double().abs() if add else 0)
    assert ((c.view.double() - exact).abs() <= (k + 2) * 2.0**-24 * size).all()


@pytest.mark.parametrize(("level", "dtype"), PRODUCTS, ids=str)
def test_an_element_does_not_depend_on_the_cut(level: str, dtype: torch.dtype) -> None:
    a, w = normal(61, 200, dtype=dtype), normal(70, 200, dtype=dtype, seed=1)
    whole, part = torch.empty(61, 70), torch.empty(61, 70)
    product(a, w, whole, level=level)
    for m in (0, 7, 40):
        for n in (0, 33):
            product(a[m:], w[n:], part[m:, n:], level=level)
            assert torch.equal(part[m:, n:], whole[m:, n:])


@pytest.mark.parametrize("level", BF16_LEVELS)
def test_bf16_products_take_subnormals_for_zero(level: str) -> None:
    """As documented for the instructions; the emulation does too."""
    a, w = torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.bfloat16)
    a[0] = 2.0**-130
    c = torch.full((2, 3), float("nan"))
    product(a, w, c, level=level)
    assert torch.equal(c, torch.tensor([[0.0] * 3, [4.0] * 3]))


@pytest.mark.parametrize(("level", "dtype"), PRODUCTS, ids=str)
def test_nan_and_infinity_stay_in_their_row(level: str, dtype: torch.dtype) -> None:
    a, w = normal(20, 40, dtype=dtype), normal(40, 40, dtype=dtype, seed=1).abs()
    a[3, 5], a[18, 0], w[33, 7] = float("nan"), float("inf"), float("inf")
    c = torch.empty(20, 40)
    product(a, w, c, level=level)
    want = a.float() @ w.float().T
    assert torch.equal(c.isnan(), want.isnan())
    assert torch.equal(c.isinf(), want.isinf())
