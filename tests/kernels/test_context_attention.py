"""`context_attention`: the formula, what each query sees, layouts, damping, bias, mass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_model import DTYPES, EACH_BACKEND, EXTRAS, model, small
from splice_model import same_bits, turn
from torch import Tensor

from mc_kernels import RopeSpec, context_attention
from mc_kernels.context_attention.cases import CASES, SMALL, Case
from mc_kernels.rope import apply_rope
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

pytestmark = EACH_BACKEND
PREFILL = next(c for c in SMALL if c.name == "small-prefill")
FEATURES = next(c for c in SMALL if c.name == "small-features")


def ids(case: Case) -> str:
    return case.name


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_formula(case: Case, dtype: torch.dtype, backend: str) -> None:
    args = small(case, dtype)
    with poisoned_empty():
        out, lse, mass = context_attention(**args, **EXTRAS, backend=backend)
    assert out.dtype == dtype
    assert lse.dtype == mass.dtype == torch.float32
    exact, plain = model(**args), model(**args, exact=False)
    for name, got, want, rival in zip(("out", "lse", "mass"), (out, lse, mass), exact, plain, strict=True):
        assert_within_error_rule(got, want, rival, what=name)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 10, 16])
def test_rotations(rotary_dim: int, interleaved: bool, backend: str) -> None:
    """Partial rotary, both pairings, YaRN's magnitude on queries and on keys; also with damping."""
    args = small(PREFILL, torch.float32)
    freq = RopeSpec.from_theta(1e3, rotary_dim).inv_freq
    args["rope"] = RopeSpec(freq, interleaved, attention_scaling=1.3)
    args["sigma"] = normal(2, PREFILL.slots).abs() * 3
    got = context_attention(**args, **EXTRAS, backend=backend)
    for x, want, rival in zip(got, model(**args), model(**args, exact=False), strict=True):
        assert_within_error_rule(x, want, rival)


def test_no_rope_and_a_scale(backend: str) -> None:
    args = {**small(PREFILL, torch.float32), "rope": None}
    out = context_attention(**args, scale=0.5, backend=backend)
    assert isinstance(out, Tensor)
    assert_within_error_rule(out, model(**args, scale=0.5)[0], model(**args, scale=0.5, exact=False)[0])
    assert max_error(out, model(**args)[0]) > 1e-2


@pytest.mark.parametrize("case", [PREFILL, SMALL[0]], ids=ids)
def test_torch_attention_on_rotated_keys(case: Case, backend: str) -> None:
    args = small(case, torch.float32, holes=False)
    q, k, v, q_pos, kv_pos, rope = (args[n] for n in ("q", "k", "v", "q_pos", "kv_pos", "rope"))
    out = context_attention(**args, backend=backend)
    mask = (kv_pos[:, None] <= q_pos[:, :, None])[:, None]
    peer = torch.nn.functional.scaled_dot_product_attention(
        apply_rope(q, q_pos[:, None], rope), apply_rope(k, kv_pos[:, None], rope), v, attn_mask=mask, enable_gqa=True
    )
    torch.testing.assert_close(out, peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [-1e4, 1e5, -1e9])
def test_probabilities_sum_to_one_where_logits_are_large(bias: float, backend: str) -> None:
    """The last bit of a logit, and so of lse, is far above a probability there."""
    args = small(PREFILL, torch.float32, holes=False)
    args |= {"v": torch.ones_like(args["v"]), "kv_bias": torch.full(args["kv_pos"].shape, bias)}
    out, _, mass = context_attention(**args, **EXTRAS, backend=backend)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(mass.sum(1), torch.full((2,), 6.0 * PREFILL.queries), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("queries", [1, 70])
def test_a_rotation_of_no_dimensions_has_a_magnitude(queries: int, backend: str) -> None:
    args = Case("x", 4, 2, 8, 80, queries).make(torch.float32)
    want = context_attention(**{**args, "rope": None}, scale=0.3 * 1.5**2, **EXTRAS, backend=backend)
    args["rope"] = RopeSpec(torch.empty(0), attention_scaling=1.5)
    got = context_attention(**args, scale=0.3, sigma=torch.ones(1, 80), **EXTRAS, backend=backend)
    assert all(same_bits(x, y) for x, y in zip(got, want, strict=True))


def test_visibility_is_by_position(backend: str) -> None:
    """Slots: empty, past, the query's own position, future. Only past and own count, wherever they lie."""
    q, k, v = normal(1, 2, 1, 8), normal(1, 1, 4, 8, seed=1), normal(1, 1, 4, 8, seed=2)
    kv_pos, q_pos = torch.tensor([[-1, 6, 3, 5]]), torch.tensor([[5]])
    _, mass = context_attention(q, k, v, q_pos, kv_pos, None, return_mass=True, backend=backend)
    assert (mass[0, :2] == 0).all()
    assert (mass[0, 2:] > 0).all()
    out = context_attention(q, k, v, q_pos, kv_pos, None, backend=backend)
    k[:, :, :2] = 100 * normal(1, 1, 2, 8, seed=3)
    v[:, :, :2] = -99.0
    assert same_bits(context_attention(q, k, v, q_pos, kv_pos, None, backend=backend), out)
    k[:, :, 3] += 1
    assert not same_bits(context_attention(q, k, v, q_pos, kv_pos, None, backend=backend), out)


def test_a_query_that_sees_nothing(backend: str) -> None:
    q, k = normal(1, 2, 3, 8), normal(1, 1, 5, 8, seed=1)
    kv_pos, q_pos = torch.tensor([[9, -1, 4, 9, 9]]), torch.tensor([[3, 4, 0]])
    bias = torch.zeros(1, 5)
    out, lse, mass = context_attention(q, k, k, q_pos, kv_pos, None, kv_bias=bias, **EXTRAS, backend=backend)
    assert (out[:, :, [0, 2]] == 0).all()
    assert (lse[:, :, [0, 2]] == float("-inf")).all()
    torch.testing.assert_close(out[:, :, 1], k[:, :, 2].expand(-1, 2, -1))
    assert lse[:, :, 1].isfinite().all()
    torch.testing.assert_close(mass, torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0]]))


@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (2, 0, 0)])
def test_empty(b: int, t: int, s: int, backend: str) -> None:
    rope = RopeSpec.from_theta(1e4, 8)
    q, k = normal(b, 4, t, 8), normal(b, 2, s, 8)
    q_pos, kv_pos = torch.zeros(b, t, dtype=torch.int64), torch.zeros(b, s, dtype=torch.int64)
    with poisoned_empty():
        out, lse, mass = context_attention(q, k, k.clone(), q_pos, kv_pos, rope, **EXTRAS, backend=backend)
    assert out.shape == q.shape
    assert (out == 0).all()
    assert lse.shape == (b, 4, t)
    assert (lse == float("-inf")).all()
    assert mass.shape == (b, s)
    assert (mass == 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_layouts(index_dtype: torch.dtype, backend: str) -> None:
    """Views of a cache: padded rows, NHD, K and V side by side, a slice of the slots; int32 positions."""
    args = small(FEATURES, torch.float32)
    want = context_attention(**args, **EXTRAS, backend=backend)
    args["q_pos"], args["kv_pos"] = args["q_pos"].to(index_dtype), args["kv_pos"].to(index_dtype)
    k, v = args["k"], args["v"]
    guarded = [Guarded(x, gap=3) for x in (k, v)]
    wide = torch.cat((k, v), -1)
    longer = torch.cat((k, k), 2)
    nhd = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
    for kk, vv in ([g.view for g in guarded], nhd, [wide[..., :8], wide[..., 8:]], [longer[:, :, : k.shape[2]], v]):
        got = context_attention(**{**args, "k": kk, "v": vv}, **EXTRAS, backend=backend)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for g in guarded:
        g.check()


def test_zero_sigma_is_no_sigma(backend: str) -> None:
    args = small(PREFILL, torch.bfloat16)
    sigma = torch.zeros(2, PREFILL.slots)
    plain = context_attention(**args, **EXTRAS, backend=backend)
    for got, want in zip(context_attention(**args, sigma=sigma, **EXTRAS, backend=backend), plain, strict=True):
        assert same_bits(got, want)
    some = context_attention(**args, sigma=sigma + 2, **EXTRAS, backend=backend)
    assert not same_bits(some[0], plain[0])


def test_damping_is_the_expected_rotation(backend: str) -> None:
    """A damped key is the mean of the key rotated at positions spread normally by sigma (Gauss-Hermite quadrature)."""
    rope = RopeSpec.from_theta(1e3, 8)
    q, k, v = normal(1, 2, 1, 8), normal(1, 1, 6, 8, seed=1), normal(1, 1, 6, 8, seed=2)
    kv_pos, q_pos = torch.tensor([[3, 9, 0, 20, 14, 7]]), torch.tensor([[20]])
    sigma = torch.tensor([[0.0, 0.5, 1.0, 2.0, 3.0, 4.0]])
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    mean = torch.zeros(1, 1, 6, 8, dtype=torch.float64)
    for z, w in zip(nodes, weights / weights.sum(), strict=True):
        mean += w * turn(k, (kv_pos[0].double() + z * sigma[0].double()), rope.inv_freq)
    logits = (turn(q, q_pos[0], rope.inv_freq) @ mean.transpose(-1, -2)) * 8**-0.5
    want = logits.softmax(-1) @ v.double()
    got = context_attention(q, k, v, q_pos, kv_pos, rope, sigma=sigma, backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    undamped = context_attention(q, k, v, q_pos, kv_pos, rope, backend=backend)
    assert max_error(undamped, want) > 1e-2


def test_bias_is_a_log_weight(backend: str) -> None:
    """An entry twice in the cache is that entry once with log 2 added; -inf removes it."""
    args = small(PREFILL, torch.float32)
    bias = torch.zeros(2, PREFILL.slots)
    bias[:, 4] = math.log(2)
    once = context_attention(**args, kv_bias=bias, return_lse=True, backend=backend)
    doubled = dict(args)
    for name, dim in (("k", 2), ("v", 2), ("kv_pos", 1)):
        doubled[name] = torch.cat((args[name], args[name].narrow(dim, 4, 1)), dim)
    twice = context_attention(**doubled, return_lse=True, backend=backend)
    for x, y in zip(once, twice, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    assert max_error(once[0], context_attention(**args, backend=backend)) > 1e-3
    gone = dict(args)
    gone["kv_pos"] = args["kv_pos"].clone()
    gone["kv_pos"][:, 4] = -1
    removed = context_attention(**args, kv_bias=bias.masked_fill(bias > 0, float("-inf")), backend=backend)
    torch.testing.assert_close(removed, context_attention(**gone, backend=backend), rtol=1e-5, atol=1e-5)


def test_mass_adds_up(backend: str) -> None:
    args = small(PREFILL, torch.float32)
    args["q_pos"][:, 0] = 0
    args["kv_pos"][args["kv_pos"] == 0] = 1  # the first query sees nothing
    _, mass = context_attention(**args, return_mass=True, backend=backend)
    seeing = PREFILL.heads * (PREFILL.queries - 1)
    torch.testing.assert_close(mass.sum(1), torch.full((2,), float(seeing)), rtol=1e-5, atol=0)
    assert (mass[args["kv_pos"] < 0] == 0).all()


def test_positions_of_ten_million(backend: str) -> None:
    """Phases are reduced in fp64: positions of 1e7 cost nothing; in fp32 the plain model goes astray."""
    args = small(PREFILL, torch.float32)
    near = model(**args)[0]
    for name in ("q_pos", "kv_pos"):
        args[name] = torch.where(args[name] >= 0, args[name] + 10_000_019, args[name])
    out, want = context_attention(**args, backend=backend), model(**args)[0]
    assert max_error(out, want) < 1e-5
    assert max_error(want, near) < 1e-5  # only differences matter
    assert max_error(model(**args, exact=False)[0], want) > 1e-2


def test_return_values(backend: str) -> None:
    args = small(SMALL[0], torch.float32)
    out = context_attention(**args, backend=backend)
    both = context_attention(**args, **EXTRAS, backend=backend)
    assert isinstance(out, Tensor)
    assert len(both) == 3
    torch.testing.assert_close(context_attention(**args, return_lse=True, backend=backend)[1], both[1])
    torch.testing.assert_close(context_attention(**args, return_mass=True, backend=backend)[1], both[2])
    torch.testing.assert_close(both[0], out)


def test_counts_of_the_cases(backend: str) -> None:
    del backend
    case = Case("by-hand", 6, 2, 16, 37, 5, batch=2)
    pairs = 33 + 34 + 35 + 36 + 37
    assert case.flops() == 2 * 6 * 4 * 16 * pairs
    assert case.bytes(torch.bfloat16) == 2 * (2 * 2 * 37 * 16 * 2 + 2 * 6 * 5 * 16 * 2 + 8 * 37 + 8 * 5)
    visible = model(**case.make(torch.float32))[1].isfinite()
    assert visible.all()
    assert {(c.heads, c.kv_heads, c.head_dim) for c in CASES} == {(9, 3, 64), (32, 8, 64), (32, 8, 128)}
