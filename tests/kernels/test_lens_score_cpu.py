"""`lens_score` in C++ at every instruction set level: the error rule, drawn calls, threads, refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from splice_model import same_bits
from test_lens_score import DTYPES, ONE, TWO, ids, make, naive
from torch import Tensor

from mc_kernels import BackendError, LensScoreWeights, lens_score, native
from mc_kernels.lens_score.cases import EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

LEVELS = [f"cpu-{level}" for level in native.isa_levels()]
pytestmark = pytest.mark.skipif(not LEVELS, reason=f"no native library: {native.available()}")
each_level = pytest.mark.parametrize("backend", LEVELS, indirect=True)
# Levels that round what bf16 entries meet to bf16, where the weights are bf16 too.
PAIRS = ("amx-emulated", "avx512bf16", "amx", "neonbf16")
# More than one tile, run and span of dimensions; none of them whole.
LONG = Case("long", 1100, 72, 8, 5, 32, 4, 1, 24, 4, 8, 16)
BROAD = Case("broad", 130, 1601, 8, 3, 32, 2, 1, 24, 4, 8, 16)
# Whole steps of a bf16 product: rows that are multiplied where they lie, and rows too many cache lines apart for that.
WHOLE = Case("whole", 600, 96, 6, 4, 32, 4, 1, 24, 4, 8, 16)
CROWDED = Case("crowded", 200, 2048, 8, 3, 32, 2, 1, 24, 4, 8, 16)
# For matrix tiles: a small net of whole steps, a strip of one panel, tiles that no second-level cache keeps.
MATRIX = Case("matrix", 320, 2080, 16, 3, 192, 2, 1, 64, 4, 8, 32)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def exactly(weights: LensScoreWeights, legal: Tensor | None, inputs: tuple[Tensor, ...]) -> Tensor:
    entries, features, queries, *rest = (x.double() for x in inputs)
    return lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal, backend="ref")


def call(weights: LensScoreWeights, legal: Tensor | None, inputs: tuple[Tensor, ...], backend: str) -> Tensor:
    entries, features, queries, *rest = inputs
    with poisoned_empty():
        return lens_score(entries, features, queries, weights.with_tensors(*rest), legal=legal, backend=backend)


def rounds(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and native.library().cpu_isa() in PAIRS


@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, LONG, BROAD, WHOLE, CROWDED, MATRIX], ids=ids)
def test_error_rule(case: Case, dtype: torch.dtype, backend: str) -> None:
    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    drawn = []
    for seed in range(16 if dtype == torch.float32 else 1):
        weights, legal, inputs = make(case, dtype, seed)
        out = call(weights, legal, inputs, backend)
        drawn.append((out, exactly(weights, legal, inputs), naive(case.n_heads, legal, *inputs)))
        assert out.dtype == torch.float32
        assert (out[~legal] == 0).all()
    out, exact, rival = (torch.stack(x) for x in zip(*drawn, strict=True))
    assert_within_error_rule(out, exact, rival, what="scores")


@each_level
def test_narrow_inputs_are_widened_exactly(backend: str) -> None:
    """Numbers of 16 bits give what they give in fp32, bit for bit, entries and weights apart."""
    for narrow in (torch.bfloat16, torch.float16):
        weights, legal, (entries, features, queries, *rest) = make(LONG, narrow)
        wide = call(weights, legal, tuple(x.float() for x in (entries, features, queries, *rest)), backend)
        if not rounds(narrow):
            assert same_bits(call(weights, legal, (entries, features, queries, *rest), backend), wide)
        widened = [x.float() for x in rest]
        assert same_bits(call(weights, legal, (entries, features, queries, *widened), backend), wide)
        assert same_bits(call(weights, legal, (entries.float(), features, queries.float(), *rest), backend), wide)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Case, int]:
    heads = draw(st.integers(1, 5))
    return Case(
        "drawn", draw(st.integers(0, 200)), draw(st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 100, 767, 768, 769])),
        draw(st.integers(1, 16)), draw(st.integers(0, 5)), heads * draw(st.integers(1, 40)), heads,
        draw(st.integers(1, 3)), draw(st.integers(0, 40)), draw(st.integers(0, 9)), draw(st.integers(0, 16)),
        draw(st.integers(1, 40)),
    ), draw(st.integers(0, 999))  # fmt: skip


@each_level
@settings(max_examples=40, deadline=None)
@given(drawn=cases(), dtype=st.sampled_from(DTYPES), masked=st.booleans(), gap=st.integers(0, 3))
def test_drawn_calls(drawn: tuple[Case, int], dtype: torch.dtype, masked: bool, gap: int, backend: str) -> None:
    case, seed = drawn
    weights, legal, inputs = make(case, dtype, seed)
    guards = [Guarded(x, gap=gap, margin=63) for x in inputs]
    args = tuple(g.view for g in guards)
    out = call(weights, legal if masked else None, args, backend)
    exact = exactly(weights, legal if masked else None, inputs)
    scale = float(exact.abs().max()) if exact.numel() else 0.0
    share = 2**-6 if rounds(dtype) else 1e-5
    assert max_error(out, exact) <= share + share * scale
    if masked:
        assert (out[~legal] == 0).all()
    for guard in guards:
        guard.check()


@each_level
def test_strided_weights_and_entries(backend: str) -> None:
    weights, legal, inputs = make(TWO, torch.bfloat16)
    want = call(weights, legal, inputs, backend)
    turned = tuple(x.mT.contiguous().mT if i > 2 and x.dim() > 1 else x for i, x in enumerate(inputs))
    assert any(not x.is_contiguous() for x in turned)
    assert same_bits(call(weights, legal, turned, backend), want)
    assert same_bits(call(weights, legal.T.contiguous().T, turned, backend), want)
    same = inputs[0][:1].expand_as(inputs[0])  # a stride of 0
    assert same_bits(
        call(weights, None, (same, *inputs[1:]), backend),
        call(weights, None, (same.contiguous(), *inputs[1:]), backend),
    )


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_calls_beside_change_a_result(dtype: torch.dtype, backend: str) -> None:
    drawn = [
        make(dataclasses.replace(LONG, entries=1500 + 100 * i, embed_dim=96, width=256, ffn_dim=96), dtype, i)
        for i in range(4)
    ]
    alone = [call(*args, backend) for args in drawn]
    torch.set_num_threads(3)
    together = [call(*args, backend) for args in drawn]

    def score(args: Any) -> Tensor:
        weights, legal, (entries, features, queries, *_) = args
        return lens_score(entries, features, queries, weights, legal=legal, backend=backend)

    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(score, drawn * 2))
    for want, *others in zip(alone, together, beside[:4], beside[4:], strict=True):
        assert all(same_bits(got, want) for got in others)


@each_level
def test_untrained_scores_are_zero(backend: str) -> None:
    entries, features, queries, _, _ = LONG.make(torch.bfloat16)
    out = lens_score(entries, features, queries, LONG.untrained(), backend=backend)
    assert out.shape == (LONG.entries, 2)
    assert not out.any()


@each_level
def test_zero_and_large_entries(backend: str) -> None:
    weights, legal, inputs = make(TWO, torch.float32)
    want = call(weights, legal, inputs, backend)
    inputs[0][3], inputs[2][1] = 0, 0
    zeroed = call(weights, legal, inputs, backend)
    assert zeroed.isfinite().all()
    assert max_error(zeroed, exactly(weights, legal, inputs)) < 1e-5
    scaled = call(weights, legal, (make(TWO, torch.float32)[2][0] * 1e6, *make(TWO, torch.float32)[2][1:]), backend)
    assert max_error(scaled, want) < 1e-5


@each_level
def test_great_logits_do_not_overflow(backend: str) -> None:
    """One entry takes all the attention, one query all of an entry's."""
    weights, legal, (entries, features, queries, *_) = make(ONE, torch.float32)
    sharp = dataclasses.replace(weights, read_k=weights.read_k * 1e4, score_q=weights.score_q * 1e4)
    out = call(sharp, legal, (entries, features, queries, *sharp.tensors()), backend)
    exact = exactly(sharp, legal, (entries, features, queries, *sharp.tensors()))
    assert out.isfinite().all()
    assert max_error(out, exact) <= 1e-3 * float(exact.abs().max())


@each_level
def test_a_nan_is_not_lost(backend: str) -> None:
    weights, _, (entries, features, queries, *rest) = make(LONG, torch.float32)
    for row in (0, 700, LONG.entries - 1):
        broken = entries.clone()
        broken[row, 7] = float("nan")
        assert call(weights, None, (broken, features, queries, *rest), backend).isnan().all()
    marked = features.clone()
    marked[5, 0] = float("nan")
    out = call(weights, None, (entries, marked, queries, *rest), backend)
    assert out[5].isnan().all()
    assert int(out.isnan().sum()) == 2


@each_level
def test_features_that_are_not_finite_stay_with_their_entry(backend: str) -> None:
    """Also where the head's inputs are rounded in two parts: infinities leave nothing, NaNs are not lost."""
    weights, _, (entries, features, queries, *_) = make(LONG, torch.bfloat16)
    weights = dataclasses.replace(weights, head_in=weights.head_in.abs() + 1, head_out=weights.head_out.abs() + 1)
    rest = weights.tensors()
    want = call(weights, None, (entries, features, queries, *rest), backend)
    others = torch.arange(LONG.entries) != 70
    # A signalling NaN whose upper half is an infinity's.
    low = torch.tensor(0x7F800001, dtype=torch.int32).view(torch.float32)
    inf, nan = float("inf"), float("nan")
    for odd, score in ((inf, inf), (-inf, nan), (nan, nan), (low, nan)):
        marked = features.clone()
        marked[70, 1] = odd
        out = call(weights, None, (entries, marked, queries, *rest), backend)
        assert same_bits(out[others], want[others])
        assert torch.equal(out[70].isnan(), torch.tensor(score).isnan().expand(2))
        assert not out[70].isfinite().any()


def test_fp64_is_for_the_oracle() -> None:
    weights, legal, (entries, features, queries, *_) = make(ONE, torch.float32)
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        lens_score(entries, features.double(), queries, weights, legal=legal, backend="cpu")


@pytest.mark.parametrize("case", [TWO, EMPTY], ids=ids)
def test_opcheck(case: Case) -> None:
    weights, legal, inputs = make(case, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.mc.lens_score.default, (*leaves, legal, weights.n_heads, None))


def test_gradients_are_those_of_the_oracle() -> None:
    weights, legal, inputs = make(TWO, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    entries, features, queries, *rest = leaves
    net = weights.with_tensors(*rest)
    grads = [
        torch.autograd.grad(lens_score(entries, features, queries, net, legal=legal, backend=b).sum(), leaves)
        for b in (None, "ref")
    ]
    assert all(same_bits(x, y) for x, y in zip(*grads, strict=True))


class Call:
    """A valid call of the library's own entry: N = 3, E = 4, d = 4, everything else 1 or 2."""

    def __init__(self) -> None:
        case = Case("call", 3, 4, 2, 1, 4, 2, 1, 2, 1, 2, 2)
        entries, features, queries, weights, legal = case.make(torch.float32)
        self.out = torch.full((3, 2), 7.0)
        self.kept = (entries, features, queries, *weights.tensors(), legal)
        self.args: dict[str, Any] = {
            "entries": list(native.view(entries)), "features": list(native.view(features)),
            "queries": list(native.view(queries)), "n_heads": 2, "legal": legal.data_ptr(),
            "out": list(native.view(self.out)), "n_threads": 1,
        }  # fmt: skip
        self.weights = {name: list(native.view(x)) for name, x in weights_by_name(weights).items()}

    def run(self) -> None:
        args = {n: tuple(x) if isinstance(x, list) else x for n, x in self.args.items()}
        native.library().lens_score(weights=tuple(tuple(x) for x in self.weights.values()), **args)


def weights_by_name(weights: LensScoreWeights) -> dict[str, Tensor]:
    return {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights) if f.name != "n_heads"}


def at(name: str, part: int, value: Any) -> Callable[[Call], None]:
    def change(c: Call) -> None:
        (c.weights if name in c.weights else c.args)[name][part] = value

    return change


def put(**given: Any) -> Callable[[Call], None]:
    return lambda c: c.args.update(given)


REFUSED: dict[str, tuple[Callable[[Call], None], type[Exception], str]] = {
    "1-D": (lambda c: c.args.update(entries=native.view(c.kept[0][0])), ValueError, "entries: expected 2 dimensions"),
    "dtype": (at("entries", 1, 3), TypeError, "entries: expected dtype MC_F32, MC_F16 or MC_BF16, got 3"),
    "queries dtype": (at("queries", 1, 2), TypeError, "queries: expected dtype 0 as entries, got 2"),
    "features dtype": (at("features", 1, 2), TypeError, "features: expected dtype MC_F32, got 2"),
    "out dtype": (at("out", 1, 1), TypeError, "out: expected dtype MC_F32, got 1"),
    "weights dtype": (at("direct", 1, 1), TypeError, "direct: expected dtype 0 as w_in, got 1"),
    "no address": (at("score_q", 0, 0), ValueError, "score_q: expected an address, got NULL"),
    "last stride": (at("entries", 3, (4, 2)), ValueError, "entries: expected a contiguous last dimension"),
    "negative stride": (at("entries", 3, (-4, 1)), ValueError, "entries: expected strides >= 0"),
    "features shape": (at("features", 2, (2, 1)), ValueError, "features: expected shape [3, *], got [2, 1]"),
    "queries shape": (at("queries", 2, (2, 3)), ValueError, "queries: expected shape [*, 4], got [2, 3]"),
    "no queries": (at("queries", 2, (0, 4)), ValueError, "queries: expected 1 <= Q <= 16, got Q=0"),
    "many queries": (at("queries", 2, (17, 4)), ValueError, "queries: expected 1 <= Q <= 16, got Q=17"),
    "no dimensions": (at("entries", 2, (3, 0)), ValueError, "entries: expected E >= 1, got 0"),
    "no width": (at("w_in", 2, (0, 4)), ValueError, "w_in: expected d >= 1, got 0"),
    "direct": (at("direct", 2, (17, 4)), ValueError, "direct: expected at most 16 rows, got 17"),
    "heads": (put(n_heads=3), ValueError, "n_heads: expected a divisor of d=4 and H dv=2, got 3"),
    "no heads": (put(n_heads=0), ValueError, "n_heads: expected a divisor of d=4 and H dv=2, got 0"),
    "head_in": (at("head_in", 2, (2, 6)), ValueError, "head_in: expected shape [*, 7], got [2, 6]"),
    "out shape": (at("out", 2, (3, 1)), ValueError, "out: expected shape [3, 2], got [3, 1]"),
    "out overlap": (at("out", 3, (1, 1)), ValueError, "out: expected a view without overlap"),
    "out is entries": (
        lambda c: at("out", 0, c.args["entries"][0])(c), ValueError, "out: expected memory apart from entries",
    ),
    "out is a weight": (
        lambda c: at("out", 0, c.weights["head_in"][0])(c), ValueError, "out: expected memory apart from head_in",
    ),
    "too few weights": (lambda c: c.weights.pop("direct"), ValueError, "weights: expected 18 tensors, got 17"),
    "threads": (put(n_threads=-1), ValueError, "n_threads: expected at least 0, got -1"),
    **{
        name: (at(name, 2, size), ValueError, f"{name}: expected shape")
        for name, size in {
            "read_norm": (1, 3), "read_k": (1, 4, 3), "read_v": (2, 4, 4), "read_out": (1, 3, 4), "mlp_norm": (2, 4),
            "mlp_gate_up": (1, 3, 4), "score_norm": (3,), "score_q": (4, 3), "score_k": (3, 4), "head_bias": (3,),
            "head_out": (3, 2), "head_out_bias": (3,),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_the_library_refuses_before_it_writes(name: str) -> None:
    change, error, words = REFUSED[name]
    call_ = Call()
    change(call_)
    with pytest.raises(error) as caught:
        call_.run()
    assert words in str(caught.value)
    assert (call_.out == 7).all()


def test_the_library_takes_no_read_passes() -> None:
    """Weights of the package have at least one; the ABI does not ask for it. Strided output."""
    for passes in (1, 0):
        call_ = Call()
        for name, view in call_.weights.items():
            if name.startswith(("read_", "mlp_")):
                view[2] = (passes, *view[2][1:])
        wide = torch.full((3, 5), 7.0)
        call_.args["out"] = native.view(wide[:, 1:3])
        call_.run()
        assert (wide[:, [0, 3, 4]] == 7).all()
        entries, features, queries, *tensors, legal = call_.kept
        if passes:
            net = LensScoreWeights(*tensors, n_heads=2)
            want = lens_score(entries, features, queries, net, legal=legal, backend="ref")
        else:  # a pass that adds nothing
            by_name = dict(zip(call_.weights, tensors, strict=True))
            by_name |= {n: torch.zeros_like(by_name[n]) for n in ("read_out", "mlp_down")}
            net = LensScoreWeights(**by_name, n_heads=2)
            want = lens_score(entries, features, queries, net, legal=legal, backend="ref")
        assert max_error(wide[:, 1:3], want) < 1e-6
