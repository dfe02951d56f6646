"""`context_attention` in Triton: the formula and its gradients on both paths (rotation on read, rotation first)."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
import attention_model
from allocations import NoAllocation
from attention_model import DTYPES, model, on, small
from splice_model import same_bits

from mc_kernels import BackendError, RopeSpec, context_attention
from mc_kernels.context_attention.cases import SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poison_, poisoned_empty

LEAVES = ("q", "k", "v", "kv_bias")
DECODE, PREFILL, FEATURES = SMALL[0], SMALL[1], SMALL[2]
# More than 64 rows (queries times heads of a group): q and k are rotated by a pass of their own.
MANY = Case("many-rows", 8, 2, 16, 45, 20, features=True)
# Slots enough for several splits, and too many to look for the future.
SPLIT = Case("split", 2, 1, 16, 300, 1, features=True)
SPLIT_MANY = Case("split-many-rows", 4, 1, 16, 300, 17, features=True)
PATHS = [DECODE, MANY, SPLIT]
BACKWARD_CASES = [*SMALL, MANY]


@pytest.fixture(autouse=True)
def _bf16_to_nearest(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts fp32 off where a GPU rounds to the nearest bf16: twice the error, and biased."""
    if device != "cpu":
        return
    interpreter = importlib.import_module("triton.runtime.interpreter")
    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, x: Any, dtype: Any) -> Any:
        if x.dtype.scalar.is_fp32() and dtype.scalar.is_bf16():
            bits = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, dtype.scalar)
        return cast(self, x, dtype)

    for name in ("cast_impl", "create_fp_trunc"):
        monkeypatch.setattr(interpreter.InterpreterBuilder, name, rounding)


def ids(case: Case) -> str:
    return case.name


run = functools.partial(attention_model.run, "triton")
assert_formula = functools.partial(attention_model.assert_formula, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*SMALL, MANY, SPLIT], ids=ids)
def test_formula(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_formula(small(case, dtype), device)


def test_splits_of_many_rows(device: str) -> None:
    assert_formula(small(SPLIT_MANY, torch.float32), device)


@pytest.mark.parametrize("case", [DECODE, MANY, SPLIT, SPLIT_MANY], ids=ids)
def test_large_scores(case: Case, device: str) -> None:
    attention_model.assert_exact_where_scores_are_large("triton", case, device)


def test_the_cases_take_the_paths_they_are_for(device: str) -> None:
    from mc_kernels.context_attention.triton_launch import Heads, forward_tiles

    tiles = {}
    for case in (DECODE, MANY, SPLIT, SPLIT_MANY):
        args = on(case.make(torch.float32), device)
        heads = Heads.of(args["q"], args["k"], args["rope"].inv_freq, False)
        tiles[case.name] = forward_tiles(args["q"], args["k"], heads)
    assert {name: (t.rotate_on_read, t.splits > 1, t.skip_future) for name, t in tiles.items()} == {
        "small-decode": (True, False, False), "many-rows": (False, False, True), "split": (True, True, False),
        "split-many-rows": (False, True, False),
    }  # fmt: skip


@pytest.mark.parametrize("slots", [40, 300, 2048, 8192, 32768])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_blocks_of_one_query_fill_one_wave(dim: int, slots: int) -> None:
    """Registers and splits go together; extras never take more splits, for which the workspace would be too small."""
    from mc_kernels.context_attention.triton_launch import H100_MULTIPROCESSORS, REGISTERS, Heads, forward_tiles

    q = torch.empty(1, 32, 1, dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 8, slots, dim, dtype=torch.bfloat16, device="meta")
    heads = Heads.of(q, k, torch.empty(dim // 2), False)
    plain, with_extras = forward_tiles(q, k, heads), forward_tiles(q, k, heads, extras=True)
    assert with_extras.splits <= plain.splits
    for tiles in (plain, with_extras):
        assert (tiles.splits - 1) * tiles.chunk < slots <= tiles.splits * tiles.chunk
        assert (tiles.registers is None) == (dim == 256)
        if tiles.registers:
            resident = REGISTERS // (32 * tiles.num_warps * tiles.registers)
            assert 8 * tiles.splits <= resident * H100_MULTIPROCESSORS


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [10, 16])
@pytest.mark.parametrize("case", [DECODE, MANY], ids=ids)
def test_rotations(case: Case, rotary_dim: int, interleaved: bool, device: str) -> None:
    """Partial rotary, both pairings, YaRN's magnitude, with damping; frequencies in fp64 too."""
    args = small(case, torch.float32)
    freq = RopeSpec.from_theta(1e3, rotary_dim).inv_freq
    args["rope"] = RopeSpec(freq.double() if interleaved else freq, interleaved, attention_scaling=1.3)
    args["sigma"] = torch.rand(args["kv_pos"].shape, generator=torch.Generator().manual_seed(1)) * 3
    assert_formula(args, device)


@pytest.mark.parametrize("case", [DECODE, MANY], ids=ids)
def test_no_rope_and_a_scale(case: Case, device: str) -> None:
    args = {**small(case, torch.float32), "rope": None, "sigma": None}
    assert_formula(args, device, scale=0.5)


@pytest.mark.parametrize("case", [DECODE, MANY], ids=ids)
def test_a_rotation_of_no_dimensions_has_a_magnitude(case: Case, device: str) -> None:
    args = {**small(case, torch.float32), "sigma": torch.ones(case.batch, case.slots)}
    weight = torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(9))
    found = []
    for rope, scale in ((RopeSpec(torch.empty(0), attention_scaling=1.5), 0.3), (None, 0.3 * 1.5**2)):
        call = functools.partial(context_attention, scale=scale, backend="triton")
        call_args = {**args, "rope": rope, "sigma": args["sigma"] if rope else None}
        found.append(gradients(lambda a, call=call: call(**on(a, device)), call_args, weight))
    for got, want in zip(*found, strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize(("dim", "rotary_dim"), [(5, 0), (7, 4), (40, 40)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_head_dimensions(dim: int, rotary_dim: int, interleaved: bool, device: str) -> None:
    """Odd ones and such as are no power of two."""
    args = small(Case("dim", 4, 2, dim, 19, 3), torch.float16) if dim % 2 == 0 else odd_case(dim)
    args["rope"] = RopeSpec(RopeSpec.from_theta(1e3, rotary_dim).inv_freq, interleaved) if rotary_dim else None
    assert_formula(args, device)


def odd_case(dim: int) -> dict[str, Any]:
    args = small(Case("dim", 4, 2, dim + 1, 19, 3), torch.float16)
    return {**args, **{name: args[name][..., :dim] for name in "qkv"}}


@pytest.mark.parametrize("case", PATHS, ids=ids)
def test_a_query_that_sees_nothing(case: Case, device: str) -> None:
    args = small(case, torch.float32)
    args["q_pos"] = torch.where(torch.arange(case.queries) == 0, -1, args["q_pos"])
    args["kv_bias"] = torch.zeros(args["kv_pos"].shape)
    args["kv_bias"][:, 5] = float("-inf")
    out, lse, mass = run(args, device)
    assert (out[:, :, 0] == 0).all()
    assert (lse[:, :, 0] == float("-inf")).all()
    assert (mass[args["kv_pos"] < 0] == 0).all()
    assert (mass[:, 5] == 0).all()
    expected = torch.full((case.batch,), float(case.heads * (case.queries - 1)))
    torch.testing.assert_close(mass.sum(1), expected, rtol=1e-5, atol=0)
    for got, want in zip((out, lse, mass), model(**args), strict=True):
        torch.testing.assert_close(
            got[:, :, 1:] if got.dim() > 2 else got, (want[:, :, 1:] if got.dim() > 2 else want).float()
        )


@pytest.mark.parametrize(("b", "t", "s"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(b: int, t: int, s: int, device: str) -> None:
    args: dict[str, Any] = {"q": torch.ones(b, 4, t, 8, requires_grad=True), "rope": RopeSpec.from_theta(1e4, 8)}
    args |= {name: torch.ones(b, 2, s, 8) for name in "kv"}
    args |= {"q_pos": torch.zeros(b, t, dtype=torch.int64), "kv_pos": torch.zeros(b, s, dtype=torch.int64)}
    out, lse, mass = run(args, device)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()
    assert mass.shape == (b, s)
    assert (mass == 0).all()
    out.sum().backward()
    assert args["q"].grad is not None
    assert (args["q"].grad == 0).all()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", [FEATURES, MANY], ids=ids)
def test_layouts(case: Case, index_dtype: torch.dtype, device: str) -> None:
    """Padded rows between guard bytes, NHD, K and V side by side, every second position; int32 positions."""
    args = small(case, torch.float32)
    want = run(args, device)
    args["q_pos"], args["kv_pos"] = args["q_pos"].to(index_dtype), args["kv_pos"].to(index_dtype)
    for name in ("kv_pos", "sigma", "kv_bias"):
        args[name] = args[name].repeat_interleave(2, 1).to(device)[:, ::2]
    k, v = args["k"], args["v"]
    guarded = [Guarded(x, gap=3) for x in (k, v)]
    wide = torch.cat((k, v), -1).to(device)
    nhd = [x.transpose(1, 2).contiguous().to(device).transpose(1, 2) for x in (k, v)]
    dim = case.head_dim
    for kk, vv in ([g.view for g in guarded], nhd, [wide[..., :dim], wide[..., dim:]]):
        for x, y in zip(run({**args, "k": kk, "v": vv}, device), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    for g in guarded:
        g.check()


@pytest.mark.parametrize("case", [DECODE, PREFILL], ids=ids)
def test_zero_sigma_is_no_sigma(case: Case, device: str) -> None:
    args = small(case, torch.bfloat16)
    sigma = torch.zeros(args["kv_pos"].shape)
    for got, want in zip(run({**args, "sigma": sigma}, device), run(args, device), strict=True):
        assert same_bits(got, want)
    assert not same_bits(run({**args, "sigma": sigma + 2}, device)[0], run(args, device)[0])


@pytest.mark.parametrize("case", [DECODE, MANY], ids=ids)
def test_positions_of_ten_million(case: Case, device: str) -> None:
    args = small(case, torch.float32)
    near = model(**args)[0]
    for name in ("q_pos", "kv_pos"):
        args[name] = torch.where(args[name] >= 0, args[name] + 10_000_019, args[name])
    out, want = run(args, device)[0], model(**args)[0]
    assert max_error(out, want) < 1e-5
    assert max_error(want, near) < 1e-5  # only differences matter
    assert max_error(model(**args, exact=False)[0], want) > 1e-2


def flat(args: dict[str, Any], return_mass: bool = True) -> tuple[Any, ...]:
    return (
        *(args[name] for name in ("q", "k", "v", "q_pos", "kv_pos")), args["rope"].inv_freq_on(args["q"].device), False,
        1.0, args.get("sigma"), args.get("kv_bias"), 0.3, return_mass,
    )  # fmt: skip


@pytest.mark.parametrize("case", PATHS, ids=ids)
def test_given_memory(case: Case, device: str) -> None:
    """Results in the caller's memory, scratch in the caller's workspace: the same bits, no byte beside them."""
    from mc_kernels.context_attention import triton_backward, triton_kernel

    args = on(small(case, torch.bfloat16), device)
    q, k, bias = args["q"], args["k"], args.get("kv_bias")
    call = flat(args)
    want = triton_kernel.context_attention_triton(*call)
    need = triton_kernel.context_attention_workspace(q, k, call[5], True)
    space = torch.full((need + 64,), 255, dtype=torch.uint8, device=device)
    wide = torch.zeros(*q.shape[:3], 2 * q.shape[3], dtype=q.dtype, device=device)
    out = (wide[..., : q.shape[3]], *(poison_(torch.empty_like(x)) for x in want[1:]))
    with NoAllocation():
        triton_kernel.context_attention_triton(*call, out=out, workspace=space[:need])
    for got, x in zip(out, want, strict=True):
        assert same_bits(got.cpu(), x.cpu())
    assert (wide[..., q.shape[3] :] == 0).all()
    assert (space[need:] == 255).all()
    with pytest.raises(ValueError, match=f"workspace: expected {need} contiguous bytes"):
        triton_kernel.context_attention_triton(*call, workspace=space[: need - 1])
    with pytest.raises(ValueError, match="out: expected lse"):
        triton_kernel.context_attention_triton(*call, out=(out[0], out[1][:, :1], out[2]))

    back = (torch.ones_like(q), *call[:-1], want[0], want[1])
    grads = triton_backward.context_attention_backward_triton(*back)
    need = triton_backward.context_attention_backward_workspace(q, k, call[5], bias)
    given = tuple(poison_(torch.empty_like(x)) for x in grads)
    space = torch.full((need + 64,), 255, dtype=torch.uint8, device=device)
    with NoAllocation():
        triton_backward.context_attention_backward_triton(*back, grads=given, workspace=space[:need])
    for got, x in zip(given, grads, strict=True):
        assert same_bits(got.cpu(), x.cpu())
    assert (space[need:] == 255).all()


def leaves_of(args: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: args[n].to(dtype or args[n].dtype).requires_grad_(True) for n in LEAVES if args.get(n) is not None}


def gradients(function: Any, args: dict[str, Any], weight: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    leaves = leaves_of(args, dtype)
    out = function({**args, **leaves})
    return list(torch.autograd.grad((out * weight.to(out)).sum(), list(leaves.values())))


def attention_on(device: str) -> Any:
    return lambda args: context_attention(**on(args, device), backend="triton")


def assert_gradients(args: dict[str, Any], device: str) -> None:
    weight = torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(9)).to(args["q"].dtype)
    exact = gradients(lambda a: model(**a)[0], args, weight, torch.float64)
    plain = gradients(lambda a: model(**a, exact=False)[0], args, weight)
    with poisoned_empty():
        got = gradients(attention_on(device), args, weight)
    for name, grad, want, rival in zip(LEAVES, got, exact, plain, strict=False):
        if not want.any():  # terms that cancel exactly, as in a softmax over one slot: what their roundings leave
            terms = weight.abs().max() * args["v"].abs().max() * max(args[x].abs().max() for x in "qk")
            assert max_error(grad, want) <= 8 * torch.finfo(grad.dtype).eps * args["q"].shape[-1] * float(terms)
            continue
        assert_within_error_rule(grad, want, rival, what=f"grad of {name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", BACKWARD_CASES, ids=ids)
def test_gradients(case: Case, dtype: torch.dtype, device: str) -> None:
    assert_gradients(small(case, dtype), device)


@pytest.mark.parametrize("case", [DECODE, MANY], ids=ids)
@pytest.mark.parametrize("bias", [-1e4, 1e5])
def test_gradients_where_scores_are_large(bias: float, case: Case, device: str) -> None:
    """A bias of all slots changes no gradient, but rounds scores: here they are all the same, and exact."""
    args = small(case, torch.float32)
    args |= {"q": torch.zeros_like(args["q"]), "kv_bias": torch.zeros(args["kv_pos"].shape)}
    weight = torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(9))
    want = gradients(attention_on(device), args, weight)
    got = gradients(attention_on(device), {**args, "kv_bias": args["kv_bias"] + bias}, weight)
    for name, x, y in zip(LEAVES, got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"grad of {name}: {text}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widest_heads(dtype: torch.dtype, device: str) -> None:
    """Of 256 dimensions, with blocks of their own."""
    args = small(Case("widest", 2, 1, 256, 37, 3), dtype)
    assert_formula(args, device)
    assert_gradients(args, device)


@pytest.mark.parametrize("rope", [None, (4, True), (6, False)], ids=str)
def test_finite_differences(rope: tuple[int, bool] | None, device: str) -> None:
    """Through partial rotations of both pairings, damping and magnitude; one query sees nothing."""
    args = small(FEATURES, torch.float32)
    if rope is None:
        args["rope"], args["sigma"] = None, None
    else:
        args["rope"] = RopeSpec(RopeSpec.from_theta(1e3, rope[0]).inv_freq, rope[1], attention_scaling=1.2)
    args["q_pos"][:, 0] = -1
    assert_finite_differences(args, device)


def assert_finite_differences(args: dict[str, Any], device: str) -> None:
    """Along one random direction of all inputs at once, central differences of the kernel's own forward in fp32."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(args["q"].shape, generator=generator)
    leaves = leaves_of(args)
    ways = [torch.randn(x.shape, generator=generator) for x in leaves.values()]
    got = gradients(attention_on(device), args, weight)
    slope = sum((g.double() * w).sum() for g, w in zip(got, ways, strict=True))
    step, ends = 2e-3, []
    for sign in (1, -1):
        moved = {n: x.detach() + sign * step * w for (n, x), w in zip(leaves.items(), ways, strict=True)}
        ends.append((attention_on(device)({**args, **moved}).cpu().double() * weight).sum())
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), slope, rtol=2e-3, atol=2e-2)


def test_opcheck(device: str) -> None:
    args = on(small(FEATURES, torch.float32), device)
    args |= {name: args[name].clone().requires_grad_(True) for name in LEAVES}
    torch.library.opcheck(torch.ops.mc.context_attention.default, (*flat(args), None, None, "triton"))


def test_compiled_forward_and_backward(device: str) -> None:
    args = on(small(FEATURES, torch.float32), device)

    def step(q: Tensor, k: Tensor, v: Tensor, kv_bias: Tensor) -> tuple[Tensor, Tensor]:
        call = {**args, "q": q * 1.5, "k": k, "v": v, "kv_bias": kv_bias}
        out, mass = context_attention(**call, return_mass=True, backend="triton")
        return out.square().sum(), mass

    torch._dynamo.reset()
    eager, compiled = ({n: x.detach().clone().requires_grad_(True) for n, x in leaves_of(args).items()} for _ in "ab")
    want_loss, want_mass = step(**eager)
    loss, mass = torch.compile(step, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close((loss, mass), (want_loss, want_mass))
    want_loss.backward()
    loss.backward()
    for name in LEAVES:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def test_refusals(device: str) -> None:
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        context_attention(**on(small(DECODE, torch.float64), device), backend="triton")
    with pytest.raises(BackendError, match="at most 256 dimensions a head, got D=320"):
        context_attention(**on(small(Case("deep", 1, 1, 320, 2), torch.float32), device), backend="triton")
    if device == "cuda":
        with pytest.raises(BackendError, match="expected cuda tensors"):
            context_attention(**small(DECODE, torch.float32), backend="triton")
