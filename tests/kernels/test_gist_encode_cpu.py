"""`gist_encode` in C++ at every instruction set level: drawn nets against the oracle, threads, autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from encode_model import DTYPES, make, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from splice_model import same_bits
from torch import Tensor

from mc_kernels import gist_encode, native
from mc_kernels.gist_encode.cases import EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty
from mc_kernels.weight_shapes import POOLS

LEVELS = [f"cpu-{level}" for level in native.isa_levels()]
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
BY_NAME = {case.name: case for case in SMALL}
ONE, GISTS, ODD, CLS = (BY_NAME[f"small/{name}"] for name in ("one", "gists", "odd", "cls"))
# Several panels of every matrix, heads that fill one, and more rows than a tile.
PANELS = Case("panels", 3, 32, 192, 128, 2, 4, 200)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, PANELS], ids=lambda case: case.name)
def test_error_rule(case: Case, dtype: torch.dtype, backend: str) -> None:
    weights, inputs = make(case, dtype)
    with poisoned_empty():
        out = gist_encode(inputs[0], weights, level=case.level, backend=backend)
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact = plain(case, weights, *(x.double() for x in inputs))
    assert_within_error_rule(out, exact, plain(case, weights, *inputs), what="gists")


def test_error_rule_of_a_whole_net() -> None:
    case = Case("whole", 2, 32, 576)
    for dtype in (torch.float32, torch.bfloat16):
        weights, inputs = make(case, dtype)
        exact = plain(case, weights, *(x.double() for x in inputs))
        assert_within_error_rule(gist_encode(inputs[0], weights, backend="cpu"), exact, plain(case, weights, *inputs))


@st.composite
def nets(draw: st.DrawFn) -> Case:
    heads, dim = draw(st.integers(1, 4)), 2 * draw(st.integers(1, 20))
    pool = draw(st.sampled_from(POOLS))
    return Case(
        "drawn", draw(st.integers(0, 5)), draw(st.integers(1, 40)), draw(st.integers(1, 90)), heads * dim,
        draw(st.integers(0, 2)), heads, draw(st.integers(1, 80)), draw(st.integers(1, 3)) if pool == "softmax" else 1,
        pool, draw(st.integers(1, 5)), draw(st.integers(1, 3)),
    )  # fmt: skip


def drawn_blocks(blocks: Tensor, layout: str) -> tuple[Tensor, Guarded | None]:
    """The same windows in other memory: rows apart, between guards, at an odd address; or overlapping ones."""
    if layout == "overlapping" and blocks.numel():
        n, k, e = blocks.shape
        row = torch.cat((blocks[0], blocks[:, -1])) if n > 1 else blocks[0]
        return row.as_strided((min(n, row.shape[0] - k + 1), k, e), (e, e, 1)), None
    guarded = Guarded(blocks, margin=5, gap=3)
    return guarded.view, guarded


@each_level
@settings(max_examples=40, deadline=None)
@given(
    case=nets(),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["guarded", "overlapping"]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_drawn_nets(
    case: Case, dtype: torch.dtype, weights_dtype: torch.dtype, layout: str, threads: int, seed: int, backend: str
) -> None:
    blocks, weights = case.make(torch.float32, seed=seed)
    weights = weights.to(dtype=weights_dtype)
    view, guarded = drawn_blocks(blocks.to(dtype), layout)
    torch.set_num_threads(threads)
    out = gist_encode(view, weights, level=case.level, backend=backend)
    exact = gist_encode(view.double(), weights.to(dtype=torch.float64), level=case.level, backend="ref")
    assert out.dtype == dtype
    products = torch.float32 if weights_dtype != torch.bfloat16 else dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(products).eps)
    # A window whose centred mean is next to nothing is scaled up, its roundings too.
    assert max_error(out, exact) <= 30 * eps * max(float(exact.abs().max()) if exact.numel() else 0.0, case.target_rms)
    if guarded is not None:
        guarded.check()


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gists_depend_on_their_window_alone(dtype: torch.dtype, backend: str) -> None:
    """Not on the windows beside it, on threads, on how these share the work, nor on calls at the same time."""
    for case in (dataclasses.replace(PANELS, blocks=21), dataclasses.replace(CLS, blocks=21)):
        blocks, weights = case.make(dtype)
        whole = gist_encode(blocks, weights, level=case.level, backend=backend)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for n in (1, 2, 9, 21):
                assert same_bits(gist_encode(blocks[:n], weights, level=case.level, backend=backend), whole[:n])

    def one(i: int) -> Tensor:
        torch.set_num_threads(3)
        return gist_encode(blocks[i : i + 3], weights, level=case.level, backend=backend)

    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(one, range(18))):
            assert same_bits(got, whole[i : i + 3])


@each_level
def test_a_window_of_nan_or_zeros_keeps_to_itself(backend: str) -> None:
    blocks, weights = GISTS.make(torch.bfloat16)
    weights = dataclasses.replace(weights, mu=torch.zeros_like(weights.mu))
    want = gist_encode(blocks, weights, backend=backend)
    blocks[0, 3, 5], blocks[1] = float("nan"), 0.0
    got = gist_encode(blocks, weights, backend=backend)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()
    assert same_bits(got[2], want[2])


@each_level
def test_untrained_is_the_centred_mean(backend: str) -> None:
    blocks, _ = PANELS.make(torch.float32)
    weights = PANELS.untrained()
    centred = blocks.double().mean(1, keepdim=True) - weights.mu.double()
    expected = centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * PANELS.target_rms
    torch.testing.assert_close(gist_encode(blocks, weights, backend=backend).double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", [ODD, CLS, EMPTY], ids=lambda case: case.name)
def test_opcheck(case: Case) -> None:
    weights, inputs = make(case, torch.float32)
    constants = (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms, "cpu")
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.gist_encode.default, (*leaves, *constants))


def test_gradients_are_the_oracles() -> None:
    weights, inputs = make(GISTS, torch.float32)
    grads = []
    for backend in ("cpu", "ref"):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = gist_encode(leaves[0], weights.with_tensors(*leaves[1:]), backend=backend)
        grads.append(torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert all(same_bits(a, b) for a, b in zip(*grads, strict=True))


def test_fp64_stays_with_the_oracle() -> None:
    blocks, weights = GISTS.make(torch.float64)
    assert gist_encode(blocks, weights).dtype == torch.float64
