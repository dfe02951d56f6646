"""`mc_kernels.array` on CuPy's arrays: the bits of the CUDA C++ ops on torch's tensors. With CuPy and a GPU where they
are, and on emulated threads with a model of CuPy everywhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cupy_model import DEVICE, module
from torch import Tensor

import mc_kernels as mc
from mc_kernels import array, cuda_extension
from mc_kernels.context_attention.cases import SMALL as ATTENTION
from mc_kernels.gist_encode.cases import SMALL as ENCODE
from mc_kernels.gist_pool.cases import Case as Pool
from mc_kernels.gist_pool.collapse_cases import SMALL as COLLAPSE
from mc_kernels.lens_score.cases import SMALL as LENS

EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@dataclass(frozen=True)
class Kind:
    """cupy: the module. device: of the torch tensors that share the arrays' memory."""

    cupy: Any
    device: str

    def share(self, x: Tensor) -> Any:
        """The tensor's memory as an array of CuPy's."""
        return self.cupy.ndarray(x) if self.device == "cpu" else self.cupy.from_dlpack(x)

    def tensor(self, x: Any) -> Tensor:
        assert isinstance(x, self.cupy.ndarray)
        return x.x if self.device == "cpu" else torch.from_dlpack(x)


@pytest.fixture
def kind(device: str, monkeypatch: pytest.MonkeyPatch) -> Kind:
    if device == "cuda":
        return Kind(pytest.importorskip("cupy"), device)
    cupy = module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return Kind(cupy, device)


def same(got: Any, want: Any, kind: Kind) -> None:
    x = kind.tensor(got)
    assert x.dtype == want.dtype
    assert torch.equal(x.isnan(), want.isnan())
    assert torch.equal(x.nan_to_num(), want.nan_to_num())


def pool_weights(w: mc.GistPoolWeights, kind: Kind) -> array.GistPoolWeights:
    return array.GistPoolWeights(*(kind.share(x) for x in w.tensors()))


@EACH_DTYPE
def test_pool(kind: Kind, dtype: torch.dtype) -> None:
    k, v, weights = Pool("x", 2, 1, 2, 2, 32, 64).make(dtype, kind.device)
    want = mc.gist_pool(k, v, weights, backend="cuda")
    got = array.gist_pool(kind.share(k), kind.share(v), pool_weights(weights, kind))
    for a, b in zip(got, want, strict=True):
        same(a, b, kind)
    if kind.device == "cpu":
        assert set(kind.cupy.devices) == {DEVICE}


def test_collapse(kind: Kind) -> None:
    args = COLLAPSE[0].make(torch.float32, kind.device)
    want = {name: args[name].clone() for name in ("k", "v")}
    mc.collapse_(**(args | want), backend="cuda")
    indices = {name: args[name].cpu().numpy() for name in ("children", "slots", "moves")}
    array.collapse_(kind.share(args["k"]), kind.share(args["v"]), pool_weights(args["weights"], kind), **indices)
    for name, exact in want.items():
        assert torch.equal(args[name], exact)


@EACH_DTYPE
def test_attention(kind: Kind, dtype: torch.dtype) -> None:
    """Positions, sigma and bias lie on the device or in the CPU's memory."""
    made = (case.make(dtype, kind.device) for case in ATTENTION)
    args = next(a for a in made if {"sigma", "kv_bias"} <= a.keys() and a["rope"] is not None)
    want = mc.context_attention(**args, return_lse=True, return_mass=True, backend="cuda")
    spec = args.pop("rope")
    rope = array.RopeSpec(spec.inv_freq.cpu().numpy(), spec.interleaved, spec.attention_scaling)
    there = {name: kind.share(x) for name, x in args.items()}
    here = {name: args[name].float().cpu().numpy() for name in ("sigma", "kv_bias")}
    here |= {name: args[name].cpu().numpy() for name in ("q_pos", "kv_pos")}
    for given in (there, there | here):
        got = array.context_attention(**given, rope=rope, return_lse=True, return_mass=True)
        for a, b in zip(got, want, strict=True):
            same(a, b, kind)
    names = ("q", "k", "v", "q_pos", "kv_pos")
    plain = mc.context_attention(*(args[n] for n in names), None, backend="cuda")
    same(array.context_attention(*(there[n] for n in names), None), plain, kind)


@EACH_DTYPE
def test_lens(kind: Kind, dtype: torch.dtype) -> None:
    entries, features, queries, weights, legal = LENS[0].make(dtype, kind.device)
    given = [kind.share(x) for x in (entries, features, queries)]
    of_arrays = array.LensScoreWeights(
        {name: kind.share(x) for name, x in weights.state_dict().items()}, n_heads=weights.n_heads
    )
    for mask in (legal, None):
        want = mc.lens_score(entries, features, queries, weights, legal=mask, backend="cuda")
        for m in [None] if mask is None else [kind.share(mask), mask.cpu().numpy()]:
            same(array.lens_score(*given, of_arrays, legal=m), want, kind)


def test_encode(kind: Kind) -> None:
    blocks, weights = ENCODE[0].make(torch.float32, kind.device)
    named = {name: kind.share(x) for name, x in weights.state_dict().items()}
    of_arrays = array.GistEncodeWeights(
        named, n_heads=weights.n_heads, target_rms=weights.target_rms, max_block_size=weights.max_block_size,
        pool=weights.pool, rope_theta=weights.rope_theta,
    )  # fmt: skip
    want = mc.gist_encode(blocks, weights, level=ENCODE[0].level, backend="cuda")
    same(array.gist_encode(kind.share(blocks), of_arrays, level=ENCODE[0].level), want, kind)


@EACH_DTYPE
@pytest.mark.parametrize("paged", [False, True], ids=["plain", "paged"])
def test_splice(kind: Kind, dtype: torch.dtype, paged: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(12, generator=generator)[:8].view(1, 8)
    shape = (2, 12, 2, 4, 16) if paged else (2, 1, 2, 32, 16)
    k, v = (torch.randn(shape, generator=generator).to(kind.device, dtype) for _ in range(2))
    new = [torch.randn(2, 2, 9, 16, generator=generator).to(kind.device, dtype) for _ in range(2)]
    edits, length, capacity = [(2, 6, 1), (12, 1, 8)], 24, 32
    plan = mc.SplicePlan.from_edits(length, [mc.Edit(*e) for e in edits], capacity=capacity)
    rope = mc.RopeSpec.from_theta(1e4, 16)
    before, after = torch.arange(length) * 2, torch.arange(plan.new_length) + 5
    want = k.clone(), v.clone()
    pages = {"pages": mc.PageTable(table.to(kind.device), 4)} if paged else {}
    mc.kv_splice_(*want, *new, plan, rope, positions=before, new_positions=after, **pages, backend="cuda")
    array.kv_splice_(
        kind.share(k), kind.share(v), *(kind.share(x) for x in new),
        array.SplicePlan.from_edits(length, [array.Edit(*e) for e in edits], capacity=capacity),
        array.RopeSpec(rope.inv_freq.numpy()), positions=before.numpy(), new_positions=after.numpy(),
        **({"pages": array.PageTable(table.numpy(), 4)} if paged else {}),
    )  # fmt: skip
    assert torch.equal(k, want[0])
    assert torch.equal(v, want[1])


@pytest.fixture
def arrays(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Arrays of the model of CuPy, for what is refused before a kernel is looked for."""
    cupy = module()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return lambda *shape, dtype=torch.float32: cupy.ndarray(torch.ones(shape, dtype=dtype))


def test_what_is_refused(arrays: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = array.GistPoolWeights.zeros(1, 1, 1, 2, 4)
    blocks, here = arrays(1, 1, 1, 2, 4), np.ones((1, 1, 1, 2, 4), np.float32)
    for error, words, call in (
        (TypeError, "v: expected device cuda:3 as k, got float32", lambda: array.gist_pool(blocks, here, weights)),
        (TypeError, "weights.w: expected device cuda:3 as k", lambda: array.gist_pool(blocks, blocks, weights)),
        (TypeError, "weights.w: expected device cpu as k",
         lambda: array.gist_pool(here, here, array.GistPoolWeights(*(arrays(*x.shape) for x in weights.arrays)))),
        (TypeError, "x: expected an array in CPU memory, got ndarray on cuda:3",
         lambda: array.fused_linear(arrays(2, 4), arrays(3, 4))),
        (TypeError, "scores: expected an array in CPU memory", lambda: array.signed_score(arrays(2, 2))),
        (TypeError, "inv_freq: expected an array in CPU memory", lambda: array.RopeSpec(arrays(2))),
        (TypeError, "k: expected dtype float32, bfloat16, float16, got float64",
         lambda: array.gist_pool(arrays(1, dtype=torch.float64), blocks, weights)),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            call()
        assert words in str(caught.value)
    monkeypatch.setattr(cuda_extension, "found", lambda: "the CUDA library was not built: no nvcc found")
    there = array.GistPoolWeights(*(arrays(*x.shape) for x in weights.arrays))
    with pytest.raises(RuntimeError, match="no nvcc found"):
        array.gist_pool(blocks, blocks, there)


def test_positions_of_other_shapes_are_refused(kind: Kind) -> None:
    q, k = torch.ones(1, 2, 1, 16, device=kind.device), torch.ones(1, 2, 5, 16, device=kind.device)
    with pytest.raises(ValueError, match="kv_pos: expected shape"):
        array.context_attention(kind.share(q), kind.share(k), kind.share(k), [[4]], [[0, 1]], None)
