"""`context_attention` as an operator: gradients, registration, compilation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_model import DTYPES, EACH_BACKEND, model, small
from torch import Tensor

from mc_kernels import BackendError, RopeSpec, context_attention
from mc_kernels.context_attention.cases import SMALL, Case
from mc_kernels.testing import assert_within_error_rule

FEATURES = next(c for c in SMALL if c.name == "small-features")
TINY = Case("tiny", 4, 2, 6, 5, 3, batch=2, features=True)
LEAVES = ("q", "k", "v", "kv_bias")


def leaves_of(args: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {n: args[n].to(dtype or args[n].dtype).requires_grad_(True) for n in LEAVES if args.get(n) is not None}


@EACH_BACKEND
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_gradients(case: Case, dtype: torch.dtype, backend: str) -> None:
    args = small(case, dtype)
    weight = torch.randn(args["q"].shape, generator=torch.Generator().manual_seed(9)).to(dtype)

    def grads(run: Any, leaf_dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = leaves_of(args, leaf_dtype)
        out = run({**args, **leaves})
        (out * weight.to(out.dtype)).sum().backward()
        found = {n: x.grad for n, x in leaves.items()}
        return {n: g for n, g in found.items() if g is not None}

    exact = grads(lambda a: model(**a)[0], torch.float64)
    plain = grads(lambda a: model(**a, exact=False)[0], None)
    got = grads(lambda a: context_attention(**a, backend=backend), None)
    assert got.keys() == exact.keys()
    for name, grad in got.items():
        assert grad.dtype == args[name].dtype
        assert_within_error_rule(grad, exact[name], plain[name], what=f"grad of {name}")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(interleaved: bool, bias: bool) -> None:
    """With damping, partial rotary and magnitude; one query sees nothing, one slot is empty."""
    args = TINY.make(torch.float64)
    args["rope"] = RopeSpec(torch.tensor([1.0, 0.3]), interleaved, attention_scaling=1.2)
    args["kv_pos"][:, 1] = -1
    args["kv_pos"][0, 0] = 3
    args["q_pos"][0, 0] = -1
    if not bias:
        args["kv_bias"] = None
    leaves = leaves_of(args)

    def run(*values: Tensor) -> Tensor:
        return context_attention(**{**args, **dict(zip(leaves, values, strict=True))}, backend="ref")

    assert torch.autograd.gradcheck(run, tuple(leaves.values()))


def test_invisible_entries_get_no_gradient() -> None:
    args = small(FEATURES, torch.float32)
    leaves = leaves_of(args)
    context_attention(**{**args, **leaves}, backend="ref").sum().backward()
    empty = args["kv_pos"] < 0
    assert empty.any()
    assert leaves["k"].grad is not None
    assert leaves["kv_bias"].grad is not None
    assert (leaves["k"].grad.movedim(1, 2)[empty] == 0).all()
    assert (leaves["kv_bias"].grad[empty] == 0).all()
    assert leaves["k"].grad.abs().sum() > 0


def test_lse_and_mass_are_constants() -> None:
    args = small(FEATURES, torch.float32)
    leaves = leaves_of(args)
    out, lse, mass = context_attention(**{**args, **leaves}, return_lse=True, return_mass=True, backend="ref")
    assert out.requires_grad
    assert not lse.requires_grad
    assert not mass.requires_grad


def op_arguments(requires_grad: bool, features: bool = True) -> tuple[Any, ...]:
    args = small(FEATURES, torch.float32)
    q, k, v, bias = (args[n].clone().requires_grad_(requires_grad) for n in LEAVES)
    return (
        q, k, v, args["q_pos"], args["kv_pos"], args["rope"].inv_freq, False, 1.0, args["sigma"] if features else None,
        bias if features else None, 0.3, True, None, None, None,
    )  # fmt: skip


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_opcheck(requires_grad: bool, features: bool) -> None:
    torch.library.opcheck(torch.ops.mc.context_attention.default, op_arguments(requires_grad, features))


def test_compiled_forward_and_backward() -> None:
    args = small(FEATURES, torch.float32)

    def step(q: Tensor, k: Tensor, v: Tensor, kv_bias: Tensor) -> tuple[Tensor, Tensor]:
        call = {**args, "q": q * 1.5, "k": k, "v": v, "kv_bias": kv_bias}
        out, mass = context_attention(**call, return_mass=True)
        return out.square().sum(), mass

    torch._dynamo.reset()
    eager, compiled = leaves_of(args), {n: x.detach().clone().requires_grad_(True) for n, x in leaves_of(args).items()}
    want_loss, want_mass = step(**eager)
    loss, mass = torch.compile(step, fullgraph=True, backend="aot_eager")(**compiled)
    torch.testing.assert_close((loss, mass), (want_loss, want_mass))
    want_loss.backward()
    loss.backward()
    for name in LEAVES:
        torch.testing.assert_close(compiled[name].grad, eager[name].grad)


def qkv(**changes: Any) -> dict[str, Any]:
    args: dict[str, Any] = {
        "q": torch.zeros(2, 4, 3, 8), "k": torch.zeros(2, 2, 5, 8), "v": torch.zeros(2, 2, 5, 8),
        "q_pos": torch.zeros(2, 3, dtype=torch.int64), "kv_pos": torch.zeros(2, 5, dtype=torch.int64),
        "rope": RopeSpec.from_theta(1e4, 8),
    }  # fmt: skip
    return {**args, **changes}


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q list": ({"q": [0.0]}, TypeError, "q: expected a tensor, got list"),
    "k dtype": ({"k": torch.zeros(2, 2, 5, 8).int()}, TypeError, "k: expected dtype"),
    "mixed dtypes": ({"v": torch.zeros(2, 2, 5, 8).bfloat16()}, TypeError, "v: expected dtype float32 as q"),
    "positions dtype": ({"q_pos": torch.zeros(2, 3)}, TypeError, "q_pos: expected dtype int64, int32"),
    "q dims": ({"q": torch.zeros(4, 3, 8)}, ValueError, "q: expected shape [B, Hq, T, D]"),
    "head dims": ({"k": torch.zeros(2, 2, 5, 4)}, ValueError, "k: expected shape"),
    "k and v": ({"v": torch.zeros(2, 2, 6, 8)}, ValueError, "v: expected shape"),
    "q_pos shape": ({"q_pos": torch.zeros(2, 4, dtype=torch.int64)}, ValueError, "q_pos: expected shape [B, T]"),
    "kv_pos shape": ({"kv_pos": torch.zeros(1, 5, dtype=torch.int64)}, ValueError, "kv_pos: expected shape [B, S]"),
    "sigma shape": ({"sigma": torch.zeros(2, 3)}, ValueError, "sigma: expected shape [B, S]"),
    "bias shape": ({"kv_bias": torch.zeros(5)}, ValueError, "kv_bias: expected shape [B, S]"),
    "bias dtype": ({"kv_bias": torch.zeros(2, 5).long()}, TypeError, "kv_bias: expected dtype"),
    "heads": ({"q": torch.zeros(2, 3, 3, 8)}, ValueError, "k: expected a number of heads that divides Hq=3"),
    "no kv heads": ({x: torch.zeros(2, 0, 5, 8) for x in "kv"}, ValueError, "k: expected a number of heads"),
    "no dims": (
        {"q": torch.zeros(2, 4, 3, 0), "k": torch.zeros(2, 2, 5, 0), "v": torch.zeros(2, 2, 5, 0)}, ValueError,
        "q: expected D >= 1",
    ),
    "device": ({"k": torch.zeros(2, 2, 5, 8, device="meta")}, TypeError, "k: expected device cpu"),
    "strides": ({"v": torch.zeros(2, 2, 8, 5).transpose(2, 3)}, ValueError, "v: expected a contiguous last"),
    "scale": ({"scale": float("nan")}, ValueError, "scale: expected a finite number"),
    "sigma alone": ({"sigma": torch.zeros(2, 5), "rope": None}, ValueError, "sigma: expected None without rope"),
    "rope kind": ({"rope": torch.ones(4)}, TypeError, "rope: expected a RopeSpec or None, got float32 tensor"),
    "rope rows": ({"rope": RopeSpec(torch.ones(2, 4))}, ValueError, "rope: expected inv_freq [D_rot/2]"),
    "rope size": ({"rope": RopeSpec.from_theta(1e4, 10)}, ValueError, "rope: expected at most D/2 = 4"),
    "backend": ({"backend": "gpu"}, BackendError, "backend: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    changes, error, words = REFUSED[name]
    with pytest.raises(error) as caught:
        context_attention(**qkv(**changes))
    assert words in str(caught.value)


def test_the_base_arguments_are_accepted() -> None:
    assert context_attention(**qkv()).shape == (2, 4, 3, 8)
