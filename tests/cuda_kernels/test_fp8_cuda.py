"""Caches of fp8 in CUDA C++: attention on both paths (tensor cores, plain), splices of bytes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_context_attention_cuda import FEW, MANY, SPLIT, SPLIT_PLAIN, WIDE, emulate, flat, on, run

from mc_kernels import Edit, RopeSpec, SplicePlan, context_attention, cuda_backend, kv_splice_
from mc_kernels.checks import FP8
from mc_kernels.context_attention import cuda
from mc_kernels.context_attention.cases import SMALL, Case
from mc_kernels.testing import assert_within_error_rule, poison_

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from attention_model import DTYPES, model, small
from fp8_model import read, with_fp8
from splice_model import same_bits

DECODE, PREFILL, FEATURES, _ = SMALL
# More rows than a tile of 8: several passes.
WIDE_MANY = Case("tensor-wide-many", 8, 1, 128, 37, 3, features=True)
CASES = [DECODE, FEATURES, FEW, MANY, WIDE, WIDE_MANY, SPLIT, SPLIT_PLAIN]


def assert_formula(args: dict[str, Any], device: str) -> None:
    want, plain = (model(**read(args, exact=exact), exact=exact) for exact in (True, False))
    for name, got, exact, rival in zip(("out", "lse", "mass"), run(args, device), want, plain, strict=True):
        assert_within_error_rule(got, exact, rival, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_formula(case: Case, dtype: torch.dtype, device: str) -> None:
    emulate(device, seed=len(case.name))
    assert_formula(with_fp8(small(case, dtype)), device)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("case", "dtype"), [(FEW, torch.float16), (WIDE, torch.bfloat16)], ids=["half", "bfloat"])
def test_rotations_on_tensor_cores(case: Case, dtype: torch.dtype, interleaved: bool, device: str) -> None:
    emulate(device)
    args = with_fp8(small(case, dtype))
    args["rope"] = RopeSpec(args["rope"].inv_freq, interleaved, attention_scaling=1.3)
    args["sigma"] = torch.rand(args["kv_pos"].shape, generator=torch.Generator().manual_seed(1)) * 3
    assert_formula(args, device)
    assert_formula({**args, "rope": None, "sigma": None}, device)


@pytest.mark.parametrize(("dim", "rotary_dim"), [(16, 10), (5, 0), (7, 4), (40, 40), (64, 32)])
def test_heads_of_any_shape(dim: int, rotary_dim: int, device: str) -> None:
    """Partial rotary, odd widths: entries that begin at any byte."""
    emulate(device)
    args = small(Case("dim", 4, 2, dim + dim % 2, 19, 2), torch.float16)
    args |= {name: args[name][..., :dim] for name in "qkv"}
    args["rope"] = RopeSpec.from_theta(1e3, rotary_dim) if rotary_dim else None
    assert_formula(with_fp8(args), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_every_number_is_read_as_it_is(dim: int, dtype: torch.dtype, device: str) -> None:
    """One visible slot, whose values are the result: all 254 of fp8 are numbers of each dtype."""
    emulate(device)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    finite = codes[codes.float().isfinite()].view(torch.uint8)
    values = torch.cat((finite, finite[: 4 * dim - 254 if dim == 64 else 2])).view(1, -1, 1, dim).view(FP8)
    heads, at = values.shape[1], torch.zeros(1, 1, dtype=torch.int64)
    q, one = torch.zeros(1, heads, 1, dim, dtype=dtype), torch.ones(heads)
    args = {"q": q, "k": values, "v": values, "q_pos": at, "kv_pos": at, "rope": None, "k_scale": one, "v_scale": one}
    assert torch.equal(run(args, device)[0], values.to(dtype))
    # As keys: a query of one 1 gives each number as a logit.
    q[..., 0] = 1
    assert torch.equal(run({**args, "scale": 1.0}, device)[1][..., 0], values.float()[..., 0, 0])


def test_layouts_and_what_is_empty(device: str) -> None:
    """NHD and interleaved caches; what no query sees is not read, whatever bytes it has."""
    emulate(device)
    args = with_fp8(small(FEW, torch.bfloat16))
    want = run(args, device)
    hidden = (args["kv_pos"] < 0)[:, None, :, None].expand_as(args["k"])
    k, v = (x.view(torch.uint8).masked_fill(hidden, 0x7F).view(FP8) for x in (args["k"], args["v"]))
    nhd = [x.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(FP8) for x in (k, v)]
    both = torch.cat((k.view(torch.uint8), v.view(torch.uint8)), -1).view(FP8)
    at_any_byte = args["k"].view(torch.uint8)  # the plain path
    off = torch.cat((at_any_byte[..., :3], at_any_byte), -1).view(FP8)[..., 3:]
    for kk, vv in ((k, v), nhd, (both[..., :64], both[..., 64:])):
        for got, x in zip(run({**args, "k": kk, "v": vv}, device), want, strict=True):
            assert same_bits(got, x)
    assert_formula({**args, "k": off}, device)


def test_given_memory(device: str) -> None:
    """The caller's results and workspace: the same bits, and scales as they are."""
    emulate(device)
    args = on(with_fp8(small(SPLIT, torch.bfloat16)), device)
    call = (*flat(args), args["k_scale"], args["v_scale"])
    want = cuda.context_attention_cuda(*call)
    space = torch.zeros(cuda.context_attention_workspace(*call), dtype=torch.uint8, device=device)
    out = tuple(poison_(torch.empty_like(x)) for x in want)
    cuda.context_attention_cuda(*call, out=(out[0], out[1], out[2]), workspace=space)
    assert all(same_bits(x.cpu(), y.cpu()) for x, y in zip(out, want, strict=True))
    with pytest.raises(ValueError, match=r"k_scale: expected an array .* with MC_F8E4M3 keys, got NULL"):
        cuda.context_attention_cuda(*call[:-2])


@pytest.mark.parametrize(("fault", "case"), [(11, FEW), (12, DECODE)], ids=["key", "value"])
def test_a_wrong_slot_is_noticed(fault: int, case: Case, emulation: Path) -> None:
    args = with_fp8(small(case, torch.bfloat16, holes=False))
    with cuda_backend.emulate(emulation) as library:
        library.emulate(0, 32, 2, fault)
        try:
            with pytest.raises(RuntimeError, match=r"context_attention.*: read of (8|1) bytes outside every view"):
                context_attention(**args, backend="cuda")
        finally:
            library.emulate(0, 0, 1, 0)


@pytest.mark.parametrize("discipline", ["ordered", "slots"])
def test_a_splice_moves_bytes(discipline: str, device: str) -> None:
    emulate(device)
    draw = torch.Generator().manual_seed(1)
    cache, new = (torch.randint(256, (2, 2, 2, n, 16), dtype=torch.uint8, generator=draw) for n in (30, 6))
    edits = [Edit(2, 5, 1), Edit(10, 0, 3), Edit(20, 1, 2)]
    plan = SplicePlan.from_edits(26, edits, capacity=30, discipline=discipline)
    results = []
    for backend, where in (("ref", "cpu"), ("cuda", device)):
        x, fresh = (y.to(where, copy=True).view(FP8) for y in (cache, new))
        kv_splice_(x[:, 0], x[:, 1], fresh[0], fresh[1], plan, backend=backend)
        results.append(x.cpu()[..., : plan.new_length, :].contiguous())
    assert same_bits(*results)
    assert not same_bits(results[0], cache.view(FP8)[..., : plan.new_length, :].contiguous())


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args = on(with_fp8(small(SPLIT, torch.bfloat16)), "cuda")
    call = (*flat(args), args["k_scale"], args["v_scale"])
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
