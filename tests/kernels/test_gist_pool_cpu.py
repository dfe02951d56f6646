"""`gist_pool` in C++ at every instruction set level: drawn calls against the formula, addresses, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from attention_model import LEVELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from splice_model import same_bits
from test_gist_pool import plain
from torch import Tensor

from mc_kernels import BackendError, GistPoolWeights, gist_pool, native
from mc_kernels.gist_pool import cpu
from mc_kernels.gist_pool.cases import EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Full groups and tiles of blocks with a rest of each, at sizes of models and beside them.
LARGER = (
    Case("larger/64", 2, 2, 2, 29, 32, 64),
    Case("larger/128", 1, 1, 2, 3, 32, 128, 2),
    Case("larger/80", 2, 1, 1, 14, 33, 80),
    Case("larger/256", 1, 1, 1, 7, 8, 256),
)


def check_rule(got: tuple[Tensor, Tensor], k: Tensor, v: Tensor, weights: GistPoolWeights) -> None:
    oracle = plain(k.double(), v.double(), *(x.double() for x in weights.tensors()))
    wide = torch.promote_types(k.dtype, weights.w.dtype)
    rival = plain(k.to(wide), v.to(wide), *(x.to(wide) for x in weights.tensors()))
    for name, out, exact, same in zip(("k_gist", "v_gist"), got, oracle, rival, strict=True):
        assert out.dtype == k.dtype
        assert_within_error_rule(out, exact, same.to(k.dtype), what=name)


@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL + LARGER, ids=lambda c: c.name)
def test_error_rule(backend: str, case: Case, dtype: torch.dtype) -> None:
    k, v, weights = case.make(dtype)
    for given_ in (weights, weights.to(dtype=torch.float32)):
        with poisoned_empty():
            got = gist_pool(k, v, given_, backend=backend)
        check_rule(got, k, v, given_)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    dim = draw(st.sampled_from([1, 2, 5, 8, 15, 16, 17, 31, 32, 33, 64, 72, 128]))
    case = Case(
        "drawn", draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 15)),
        draw(st.integers(1, 40)), dim, draw(st.integers(1, 3)),
    )  # fmt: skip
    return {
        "case": case, "seed": draw(st.integers(0, 99)), "gap": draw(st.sampled_from([0, 1, 3])),
        "swap": draw(st.booleans()), "weights": draw(st.sampled_from(DTYPES)), "scale": draw(st.sampled_from([1, 30])),
    }  # fmt: skip


@each_level
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls(), dtype=st.sampled_from(DTYPES))
def test_drawn_calls_against_the_formula(backend: str, call: dict[str, Any], dtype: torch.dtype) -> None:
    """Views with gaps in any order of dimensions, at addresses that are aligned to nothing but an element."""
    k, v, weights = call["case"].make(dtype, seed=call["seed"])
    weights = weights.to(dtype=call["weights"])
    weights = GistPoolWeights(weights.w * call["scale"], *weights.tensors()[1:])
    guards = [Guarded(x.transpose(1, 3) if call["swap"] else x, gap=call["gap"], margin=7) for x in (k, v)]
    views = [x.view.transpose(1, 3) if call["swap"] else x.view for x in guards]
    held = [Guarded(x, gap=call["gap"], margin=5) for x in weights.tensors()]
    got = gist_pool(*views, GistPoolWeights(*(x.view for x in held)), backend=backend)
    for guard in guards + held:
        guard.check()
    # With so few outputs another computation's error is luck: a rounding of the output, and fp32's of logits and sums.
    logits = weights.w.double().norm(dim=-1).max() * (2 * call["case"].head_dim) ** 0.5
    most = max(float(x.abs().max()) for x in (k, v))
    sums = 4 * torch.finfo(torch.float32).eps * (4 + float(logits)) * (most + 1)
    for out, exact in zip(got, plain(k.double(), v.double(), *(x.double() for x in weights.tensors())), strict=True):
        assert out.dtype == dtype
        assert max_error(out, exact) <= torch.finfo(dtype).eps * float(exact.abs().max()) + sums


@each_level
@pytest.mark.parametrize("case", EMPTY, ids=lambda c: c.name)
def test_empty(backend: str, case: Case) -> None:
    k, v, weights = case.make(torch.bfloat16)
    k_gist, _ = gist_pool(k, v, weights, backend=backend)
    assert k_gist.shape == (k.shape[0], 2, case.blocks, 1, case.head_dim)


@each_level
def test_the_untrained_mean_and_zero_vectors(backend: str) -> None:
    k, v, _ = SMALL[0].make(torch.float32)
    zeros = GistPoolWeights.zeros(3, 2, 1, 32, 16)
    assert max_error(gist_pool(k, v, zeros, backend=backend)[0][..., 0, :], k.mean(3)) < 1e-6
    assert (gist_pool(torch.zeros_like(k), torch.zeros_like(v), zeros, backend=backend)[1] == 0).all()


@each_level
def test_nan_and_infinity_stay_in_their_block(backend: str) -> None:
    k, v, weights = LARGER[0].make(torch.float32)
    clean = gist_pool(k, v, weights, backend=backend)
    for value in (float("nan"), float("inf")):
        broken = v.clone()
        broken[1, 1, 4, 31, 63] = value
        for out, want in zip(gist_pool(k, broken, weights, backend=backend), clean, strict=True):
            assert out[1, 1, 4].isnan().all()
            kept = torch.ones(out.shape[:3], dtype=torch.bool)
            kept[1, 1, 4] = False
            assert same_bits(out[kept], want[kept])


@each_level
def test_a_child_with_a_bias_of_minus_infinity_counts_for_nothing(backend: str) -> None:
    k, v, weights = SMALL[0].make(torch.float32)
    b = weights.b.clone()
    b[..., 5] = float("-inf")
    masked = GistPoolWeights(weights.w, b, weights.m, weights.c)
    got = gist_pool(k, v, masked, backend=backend)
    check_rule(got, k, v, masked)
    k[:, :, :, 5] = 3.0
    assert same_bits(gist_pool(k, v, masked, backend=backend)[0], got[0])


@each_level
def test_threads_do_not_change_the_result(backend: str) -> None:
    calls_ = [Case("x", 10, 1, 3, n, 32, 64).make(torch.bfloat16, seed=n) for n in (1, 13, 40)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [gist_pool(*x, backend=backend) for x in calls_]
        torch.set_num_threads(3)
        together = [gist_pool(*x, backend=backend) for x in calls_]
        with ThreadPoolExecutor(4) as pool:
            beside = list(pool.map(lambda x: gist_pool(*x, backend=backend), calls_ * 2))
    finally:
        torch.set_num_threads(threads)
    for want, *others in zip(alone, together, beside[:3], beside[3:], strict=True):
        for got in others:
            assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


@each_level
def test_opcheck_and_gradients(backend: str) -> None:
    k, v, weights = SMALL[3].make(torch.float32)
    inputs = [x.clone().requires_grad_() for x in (k, v, *weights.tensors())]
    torch.library.opcheck(torch.ops.mc.gist_pool.default, (*inputs, "cpu"))
    got = gist_pool(inputs[0], inputs[1], GistPoolWeights(*inputs[2:]))
    want = gist_pool(inputs[0], inputs[1], GistPoolWeights(*inputs[2:]), backend="ref")
    for a, b in zip(
        torch.autograd.grad(got[0].square().sum(), inputs), torch.autograd.grad(want[0].square().sum(), inputs),
        strict=True,
    ):  # fmt: skip
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_who_serves() -> None:
    k, v, weights = SMALL[0].make(torch.float64)
    assert cpu._supports(k, v, weights.w) == "fp64 is for the oracle"
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        gist_pool(k.float(), v.float(), weights, backend="cpu")


class Call:
    """Valid calls of the library's own entries: 1 layer, 1 head, G = 1, K = 2, D = 4; two blocks, or a cache of 6
    slots."""

    def __init__(self, entry: str) -> None:
        self.entry = entry
        self.weights = {"w": torch.ones(1, 1, 1, 8), "b": torch.zeros(1, 1, 1, 2)}
        self.weights |= {"m": torch.zeros(1, 1, 8, 8), "c": torch.zeros(1, 1, 8)}
        self.kept: list[Tensor] = []
        if entry == "gist_pool":
            self.read = {"k": torch.ones(1, 1, 2, 2, 4), "v": torch.ones(1, 1, 2, 2, 4)}
            self.written = {n: torch.full((1, 1, 2, 1, 4), 7.0) for n in ("k_gist", "v_gist")}
        else:
            self.read = {}
            self.written = {n: torch.full((1, 1, 1, 6, 4), 7.0) for n in ("k", "v")}
        tensors = self.read | self.written | self.weights
        self.args: dict[str, Any] = {n: list(native.view(x)) for n, x in tensors.items()} | {"n_threads": 1}
        if entry == "collapse":
            self.args |= {"n_blocks": 2, "n_segments": 1}
            self.array("children", [[0, 1], [3, 4]])
            self.array("gist_slots", [[0], [1]])
            self.array("segments", [[5, 3, 1]])

    def array(self, name: str, values: Any) -> None:
        self.kept.append(torch.tensor(values))
        self.args[name] = self.kept[-1].data_ptr()

    def view(self, name: str, part: int, value: Any) -> None:
        self.args[name][part] = value

    def share(self, name: str, other: str) -> None:
        self.args[name][0] = self.args[other][0]

    def run(self) -> None:
        args = {n: tuple(x) if isinstance(x, list) else x for n, x in self.args.items()}
        getattr(native.library(), self.entry)(**args)


Refusal = tuple[Callable[[Call], None], type[Exception], str]
WEIGHTS: dict[str, Refusal] = {
    "weights dtype": (lambda c: c.view("w", 1, 3), TypeError, "weights.w: expected dtype MC_F32, MC_F16 or MC_BF16"),
    "weights dtypes": (lambda c: c.view("m", 1, 1), TypeError, "weights.m: expected dtype 0 as weights.w, got 1"),
    "w": (lambda c: c.view("w", 2, (1, 1, 1, 7)), ValueError, "weights.w: expected shape [*, 1, *, 8]"),
    "b": (lambda c: c.view("b", 2, (1, 2, 1, 2)), ValueError, "weights.b: expected shape [1, 1, 1, *]"),
    "m": (lambda c: c.view("m", 2, (1, 1, 8, 7)), ValueError, "weights.m: expected shape [1, 1, 8, 8]"),
    "c": (lambda c: c.view("c", 2, (2, 1, 8)), ValueError, "weights.c: expected shape [1, 1, 8]"),
    "m stride": (lambda c: c.view("m", 3, (64, 64, 1, 8)), ValueError, "weights.m: expected a contiguous last"),
    "v dtype": (lambda c: c.view("v", 1, 1), TypeError, "v: expected dtype 0 as k, got 1"),
    "no address": (lambda c: c.view("k", 0, 0), ValueError, "k: expected an address, got NULL"),
    "threads": (lambda c: c.args.update(n_threads=-1), ValueError, "n_threads: expected at least 0, got -1"),
}
POOL: dict[str, Refusal] = {
    "v shape": (lambda c: c.view("v", 2, (1, 1, 2, 1, 4)), ValueError, "v: expected shape [1, 1, 2, 2, 4]"),
    "out shape": (lambda c: c.view("v_gist", 2, (1, 1, 2, 2, 4)), ValueError, "v_gist: expected shape [1, 1, 2, 1, 4]"),
    "out overlap": (lambda c: c.view("k_gist", 3, (8, 8, 2, 4, 1)), ValueError, "k_gist: expected a view without"),
    "out is k": (lambda c: c.share("k_gist", "k"), ValueError, "k_gist: expected memory apart from k"),
    "out is m": (lambda c: c.share("v_gist", "m"), ValueError, "v_gist: expected memory apart from weights.m"),
    "one out": (lambda c: c.share("v_gist", "k_gist"), ValueError, "v_gist: expected memory apart from k_gist"),
    "K": (lambda c: c.view("b", 2, (1, 1, 1, 1)), ValueError, "weights.b: expected shape [1, 1, 1, 2]"),
}
COLLAPSE: dict[str, Refusal] = {
    "v is k": (lambda c: c.share("v", "k"), ValueError, "v: expected memory apart from k"),
    "k is w": (lambda c: c.share("k", "w"), ValueError, "k: expected memory apart from weights.w"),
    "overlap": (lambda c: c.view("k", 3, (24, 24, 24, 3, 1)), ValueError, "k: expected a view without overlap"),
    "layers": (
        lambda c: [c.view(n, 2, (2, 1, 1, 3, 4)) for n in ("k", "v")][-1], ValueError,
        "weights.w: expected shape [2, 1, 1, 8]",
    ),
    "blocks": (lambda c: c.args.update(n_blocks=-1), ValueError, "n_blocks: expected at least 0, got -1"),
    "no children": (lambda c: c.args.update(children=0), ValueError, "children: expected an array, got NULL"),
    "child": (lambda c: c.array("children", [[0, 1], [6, 4]]), ValueError, "children[1, 0]: expected 0..5, got 6"),
    "slot": (lambda c: c.array("gist_slots", [[0], [-1]]), ValueError, "gist_slots[1, 0]: expected 0..5, got -1"),
    "slot twice": (lambda c: c.array("gist_slots", [[2], [2]]), ValueError, "gist_slots: expected each slot once"),
    "segment": (lambda c: c.array("segments", [[5, 3, 2]]), ValueError, "segments[0]: expected slots within 6"),
    "overflow": (lambda c: c.array("segments", [[1, 3, 2**63 - 1]]), ValueError, "segments[0]: expected slots within"),
}  # fmt: skip
REFUSED = [(e, n, r) for e, more in (("gist_pool", POOL), ("collapse", COLLAPSE)) for n, r in (WEIGHTS | more).items()]


@pytest.mark.parametrize(("entry", "refusal"), [pytest.param(e, r, id=f"{e}-{n}") for e, n, r in REFUSED])
def test_the_library_refuses_before_it_writes(entry: str, refusal: Refusal) -> None:
    change, error, words = refusal
    call = Call(entry)
    change(call)
    with pytest.raises(error) as caught:
        call.run()
    assert words in str(caught.value)
    assert all((x == 7).all() for x in call.written.values())


@pytest.mark.parametrize("entry", ["gist_pool", "collapse"])
def test_the_base_calls_are_accepted(entry: str) -> None:
    call = Call(entry)
    call.run()
    want = 1.0 if entry == "gist_pool" else 7.0
    assert all(torch.allclose(x, torch.full_like(x, want)) for x in call.written.values())
