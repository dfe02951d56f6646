"""`context_attention` in CUDA C++: the formula on both paths (tensor cores, plain), layouts, given memory, refusals."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import BackendError, RopeSpec, context_attention, cuda_backend
from mc_kernels.context_attention import cuda
from mc_kernels.context_attention.cases import SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poison_

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import attention_model
from attention_model import DTYPES, model, on, small
from splice_model import same_bits

DECODE, PREFILL, FEATURES, ONE = SMALL
# In 16 bits on tensor cores: up to 8 rows, and tiles of 16; both widths of heads.
FEW = Case("tensor-few", 4, 2, 64, 61, 1, features=True)
MANY = Case("tensor-many", 6, 2, 64, 47, 7, batch=2)
WIDE = Case("tensor-wide", 4, 1, 128, 70, 2)
WIDE_MANY = Case("tensor-wide-many", 8, 1, 128, 37, 3, features=True)
# Slots enough for several splits.
SPLIT = Case("split", 2, 1, 64, 300, 1, features=True)
SPLIT_PLAIN = Case("split-plain", 2, 1, 16, 300, 1, features=True)
# More splits and more dimensions than are joined in one turn.
MANY_SPLITS = Case("many-splits", 2, 1, 160, 570, 1, features=True)
CASES = [*SMALL, FEW, MANY, WIDE, WIDE_MANY, SPLIT, SPLIT_PLAIN, MANY_SPLITS]
TENSOR = [FEW, WIDE]


def emulate(device: str, **how: int) -> None:
    """How emulated blocks run: one warp a block, unless a test wants more."""
    if device == "cpu":
        cuda_backend.library().emulate(**{"seed": 0, "threads": 32, "blocks": 3, "fault": 0} | how)


run = functools.partial(attention_model.run, "cuda")
assert_formula = functools.partial(attention_model.assert_formula, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_formula(case: Case, dtype: torch.dtype, device: str) -> None:
    emulate(device, seed=len(case.name))
    assert_formula(small(case, dtype), device)


@pytest.mark.parametrize("case", [DECODE, MANY, SPLIT, SPLIT_PLAIN], ids=lambda c: c.name)
def test_large_scores(case: Case, device: str) -> None:
    emulate(device, threads=64)
    attention_model.assert_exact_where_scores_are_large("cuda", case, device)


@pytest.mark.parametrize("case", [WIDE_MANY, DECODE, MANY_SPLITS], ids=lambda c: c.name)
def test_warps_of_a_block_are_joined(case: Case, device: str) -> None:
    emulate(device, threads=128, blocks=1)
    assert_formula(small(case, torch.bfloat16), device)


def test_every_order_gives_the_same(device: str) -> None:
    for case in (SPLIT, SPLIT_PLAIN):
        args = small(case, torch.float16)
        emulate(device, threads=64)
        want = run(args, device)
        for seed in (1, 2):
            emulate(device, threads=64, seed=seed)
            assert all(same_bits(x, y) for x, y in zip(run(args, device), want, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("case", TENSOR, ids=lambda c: c.name)
def test_rotations_on_tensor_cores(case: Case, interleaved: bool, device: str) -> None:
    emulate(device)
    args = small(case, torch.bfloat16)
    args["rope"] = RopeSpec(args["rope"].inv_freq, interleaved, attention_scaling=1.3)
    args["sigma"] = torch.rand(args["kv_pos"].shape, generator=torch.Generator().manual_seed(1)) * 3
    assert_formula(args, device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 10), (5, 0), (7, 4), (40, 40), (64, 32)])
def test_heads_of_any_shape(dim: int, rotary_dim: int, interleaved: bool, device: str) -> None:
    """Partial rotary of both pairings, odd widths, YaRN's magnitude; frequencies in fp64 too."""
    emulate(device)
    args = small(Case("dim", 4, 2, dim + dim % 2, 19, 2), torch.float16)
    args |= {name: args[name][..., :dim] for name in "qkv"}
    freq = RopeSpec.from_theta(1e3, rotary_dim or 2).inv_freq
    spec = RopeSpec(freq.double() if interleaved else freq, interleaved, attention_scaling=1.3)
    args["rope"] = spec if rotary_dim else None
    assert_formula(args, device)


def test_no_rope_and_a_scale(device: str) -> None:
    emulate(device)
    for case in (FEW, DECODE):
        assert_formula({**small(case, torch.bfloat16), "rope": None, "sigma": None}, device, scale=0.5)


@pytest.mark.parametrize("case", [MANY, PREFILL, SPLIT], ids=lambda c: c.name)
def test_a_query_that_sees_nothing(case: Case, device: str) -> None:
    """And slots that none sees: what lies there, NaN too, is not read."""
    emulate(device)
    args = small(case, torch.float16)
    args["q_pos"] = torch.where(torch.arange(case.queries) == 0, -1, args["q_pos"])
    args["kv_bias"] = torch.zeros(args["kv_pos"].shape)
    args["kv_bias"][:, 5] = float("-inf")
    exact, plain = model(**args), model(**args, exact=False)
    unseen = (args["kv_pos"] < 0) | (args["kv_pos"] > args["q_pos"].amax(1, keepdim=True))
    for name in "kv":
        args[name] = args[name].masked_fill(unseen[:, None, :, None], float("nan"))
    out, lse, mass = run(args, device)
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == float("-inf")).all()
    assert (mass[unseen] == 0).all()
    assert (mass[:, 5] == 0).all()
    assert_within_error_rule(out, exact[0], plain[0])
    assert_within_error_rule(mass, exact[2], plain[2], what="mass")


@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b: int, t: int, s: int, device: str) -> None:
    emulate(device)
    args: dict[str, Any] = {"q": torch.ones(b, 4, t, 64, dtype=torch.float16), "rope": RopeSpec.from_theta(1e4, 64)}
    args |= {name: torch.ones(b, 2, s, 64, dtype=torch.float16) for name in "kv"}
    args |= {"q_pos": torch.zeros(b, t, dtype=torch.int64), "kv_pos": torch.zeros(b, s, dtype=torch.int64)}
    out, lse, mass = run(args, device)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert mass.shape == (b, s)
    assert (mass == 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", [FEW, FEATURES], ids=lambda c: c.name)
def test_layouts(case: Case, index_dtype: torch.dtype, device: str) -> None:
    """Padded rows between guard bytes (off 16 bytes: plain), NHD, K and V side by side, every second position."""
    emulate(device)
    args = small(case, torch.bfloat16)
    exact, plain = model(**args)[0], model(**args, exact=False)[0]
    args["q_pos"], args["kv_pos"] = args["q_pos"].to(index_dtype), args["kv_pos"].to(index_dtype)
    for name in ("kv_pos", "sigma", "kv_bias"):
        args[name] = args[name].repeat_interleave(2, 1).to(device)[:, ::2]
    k, v = args["k"], args["v"]
    guarded = [Guarded(x, gap=3) for x in (k, v)]
    wide = torch.cat((k, v), -1).to(device)
    nhd = [x.transpose(1, 2).contiguous().to(device).transpose(1, 2) for x in (k, v)]
    dim = case.head_dim
    for kk, vv in ([g.view for g in guarded], nhd, [wide[..., :dim], wide[..., dim:]]):
        assert_within_error_rule(run({**args, "k": kk, "v": vv}, device)[0], exact, plain)
    for g in guarded:
        g.check()


def test_zero_sigma_is_no_sigma(device: str) -> None:
    emulate(device)
    for case in (WIDE, DECODE):
        args = small(case, torch.bfloat16)
        sigma = torch.zeros(args["kv_pos"].shape)
        for got, want in zip(run({**args, "sigma": sigma}, device), run(args, device), strict=True):
            assert same_bits(got, want)
        assert not same_bits(run({**args, "sigma": sigma + 2}, device)[0], run(args, device)[0])


def test_positions_of_ten_million(device: str) -> None:
    emulate(device)
    for case, dtype, most in ((DECODE, torch.float32, 1e-5), (FEW, torch.float16, 2e-3)):
        args = small(case, dtype)
        near = model(**args)[0]
        for name in ("q_pos", "kv_pos"):
            args[name] = torch.where(args[name] >= 0, args[name] + 10_000_019, args[name])
        out, want = run(args, device)[0], model(**args)[0]
        assert max_error(out, want) < most
        assert max_error(want, near) < 1e-5  # only differences matter


def flat(args: dict[str, Any], return_mass: bool = True) -> tuple[Any, ...]:
    device = args["q"].device
    extras = [None if args.get(n) is None else args[n].float() for n in ("sigma", "kv_bias")]
    return (
        *(args[name] for name in ("q", "k", "v", "q_pos", "kv_pos")), args["rope"].inv_freq_on(device).double(), False,
        1.0, *extras, 0.3, return_mass,
    )  # fmt: skip


@pytest.mark.parametrize("case", [SPLIT, SPLIT_PLAIN, MANY], ids=lambda c: c.name)
def test_given_memory(case: Case, device: str) -> None:
    """Results in the caller's memory, scratch in the caller's workspace: the same bits, no byte beside them."""
    emulate(device)
    args = on(small(case, torch.bfloat16), device)
    q, call = args["q"], flat(args)
    want = cuda.context_attention_cuda(*call)
    need = cuda.context_attention_workspace(*call)
    assert need >= 4 * q.shape[0] * case.heads * case.queries * case.slots
    space = torch.full((need + 64,), 255, dtype=torch.uint8, device=device)
    wide = torch.zeros(*q.shape[:3], 2 * q.shape[3], dtype=q.dtype, device=device)
    out = (wide[..., : q.shape[3]], poison_(torch.empty_like(want[1])), poison_(torch.empty_like(want[2])))
    cuda.context_attention_cuda(*call, out=out, workspace=space[:need])
    for got, x in zip(out, want, strict=True):
        assert same_bits(got.cpu(), x.cpu())
    assert (wide[..., q.shape[3] :] == 0).all()
    assert (space[need:] == 255).all()
    with pytest.raises(ValueError, match=f"workspace: expected {need} bytes on a multiple of 16, got {need - 8}"):
        cuda.context_attention_cuda(*call, workspace=space[: need - 8])
    with pytest.raises(ValueError, match="out: expected lse"):
        cuda.context_attention_cuda(*call, out=(out[0], out[1][:, :1], out[2]))
    with pytest.raises(ValueError, match="out: expected contiguous lse"):
        cuda.context_attention_cuda(*call, out=(out[0], torch.zeros(*want[1].shape, 2, device=device)[..., 0], out[2]))


def test_many_rows_are_served_but_not_chosen(device: str) -> None:
    emulate(device)
    args = small(Case("prefill", 2, 1, 64, 40, 33), torch.float16)
    with pytest.raises(BackendError, match="at most 64 queries times heads of a group"):
        run(args, device)
    got = cuda.context_attention_cuda(*flat(on(args, device)))
    exact, plain = model(**args, scale=0.3), model(**args, scale=0.3, exact=False)
    for x, want, rival in zip(got, exact, plain, strict=True):
        assert_within_error_rule(x.cpu(), want, rival)


def test_refusals(device: str) -> None:
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        context_attention(**on(small(DECODE, torch.float64), device), backend="cuda")
    with pytest.raises(BackendError, match="at most 256 dimensions a head, got D=320"):
        context_attention(**on(small(Case("deep", 1, 1, 320, 2), torch.float32), device), backend="cuda")
    if device == "cuda":
        with pytest.raises(BackendError, match="expected cuda tensors"):
            context_attention(**small(DECODE, torch.float32), backend="cuda")


def test_gradients_are_those_of_others(device: str) -> None:
    """Forward only: the backward is Triton's or the oracle's, from this forward's lse."""
    emulate(device)
    args = on(small(FEATURES, torch.float32), device)
    grads = []
    args["rope"] = RopeSpec(args["rope"].inv_freq.double())  # frequencies in fp64 are no fp64 call
    for backend in ("cuda", "ref"):
        leaves = {name: args[name].clone().requires_grad_(True) for name in ("q", "k", "v", "kv_bias")}
        out = context_attention(**{**args, **leaves}, backend=backend)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
        grads.append([x.grad for x in leaves.values()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_opcheck(device: str) -> None:
    emulate(device)
    args = on(small(FEATURES, torch.float32), device)
    torch.library.opcheck(torch.ops.mc.context_attention.default, (*flat(args), None, None, "cuda"))


@pytest.mark.parametrize(("fault", "case"), [(11, FEW), (12, DECODE)], ids=["key", "value"])
def test_a_wrong_slot_is_noticed(fault: int, case: Case, emulation: Path) -> None:
    args = small(case, torch.bfloat16, holes=False)
    args["k"] = args["k"].clone()  # else what follows the keys is the values
    with cuda_backend.emulate(emulation) as library:
        library.emulate(0, 32, 2, fault)
        try:
            with pytest.raises(RuntimeError, match=r"context_attention.*: read of \d+ bytes outside every view"):
                context_attention(**args, backend="cuda")
        finally:
            library.emulate(0, 0, 1, 0)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = on(small(SPLIT, torch.bfloat16), "cuda")
    call = flat(args)
    want = [x.clone() for x in cuda.context_attention_cuda(*call)]
    workspace = torch.empty(cuda.context_attention_workspace(*call), dtype=torch.uint8, device="cuda")
    out = tuple(torch.empty_like(x) for x in want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.context_attention_cuda(*call, out=(out[0], out[1], out[2]), workspace=workspace)
    for x in out:
        poison_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(out, want, strict=True))
