"""The formula of `context_attention`, written out twice for its tests: exact in fp64, and plainly in a given dtype."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from splice_model import plain_turn, turn
from torch import Tensor

from mc_kernels import context_attention, native
from mc_kernels.context_attention.cases import Case
from mc_kernels.testing import assert_within_error_rule, poisoned_empty

EXTRAS: dict[str, Any] = {"return_lse": True, "return_mass": True}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Implementations that take CPU tensors here, `cpu` once without the native library and per instruction set level that
# the library has on this machine once as few queries are attended and once as many are, which are matrix products.
LEVELS = [f"cpu-{level}" for level in native.isa_levels(matrix=False)]
LEVELS += [f"cpu-{level}-tiles" for level in native.isa_levels()]
BACKENDS = ["ref", "cpu-torch", *LEVELS]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def _turned(x: Tensor, positions: Tensor, rope: Any, exact: bool) -> Tensor:
    """x [B, H, n, D] at positions [B, n]."""
    if rope is None:
        return x
    rows = [
        turn(row, pos, rope.inv_freq, rope.interleaved) if exact else plain_turn(row, pos, rope)
        for row, pos in zip(x, positions, strict=True)
    ]
    return (torch.stack(rows) if rows else x) * rope.attention_scaling


def _damped(x: Tensor, sigma: Tensor | None, rope: Any) -> Tensor:
    if sigma is None:
        return x
    damp = torch.exp(-((sigma[..., None].double() * rope.inv_freq.double()) ** 2) / 2)
    damp = damp.repeat_interleave(2, -1) if rope.interleaved else torch.cat((damp, damp), -1)
    rest = damp.new_ones(*damp.shape[:-1], x.shape[-1] - damp.shape[-1])
    return x * torch.cat((damp, rest), -1)[:, None].to(x.dtype)


def model(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, rope: Any, *, sigma: Tensor | None = None,
    kv_bias: Tensor | None = None, scale: float | None = None, exact: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, lse, mass; fp64 if `exact`, else in q's dtype throughout. All scores at once, heads repeated."""
    if exact:
        q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    keys = _damped(_turned(k, kv_pos, rope, exact), sigma, rope).repeat_interleave(groups, 1)
    logits = _turned(q, q_pos, rope, exact) @ keys.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if kv_bias is not None:
        logits = logits + kv_bias[:, None, None].to(logits.dtype)
    visible = (kv_pos[:, None] >= 0) & (kv_pos[:, None] <= q_pos[:, :, None])
    logits = logits.masked_fill(~visible[:, None], float("-inf"))
    blind = ~visible.any(-1)[:, None, :, None]
    p = logits.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0)
    out = p @ v.repeat_interleave(groups, 1)
    return out, logits.logsumexp(-1), p.sum((1, 2))


def small(case: Case, dtype: torch.dtype, *, holes: bool = True) -> dict[str, Any]:
    """A case's arguments with a third of the slots empty and queries in the middle of the entries."""
    args = case.make(dtype)
    if holes and case.slots > 3:
        args["kv_pos"][:, ::3] = -1
        args["q_pos"] = args["q_pos"] - case.slots // 3
    return args


def on(args: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in args.items()}


def run(backend: str, args: dict[str, Any], device: str, **kwargs: Any) -> tuple[Tensor, ...]:
    """out, lse and mass, on the CPU."""
    with poisoned_empty():
        got = context_attention(**on(args, device), **EXTRAS, backend=backend, **kwargs)
    return tuple(x.cpu() for x in got)


def assert_formula(backend: str, args: dict[str, Any], device: str, **kwargs: Any) -> None:
    """By the error rule."""
    exact, plain = model(**args, **kwargs), model(**args, exact=False, **kwargs)
    outputs = zip(("out", "lse", "mass"), run(backend, args, device, **kwargs), exact, plain, strict=True)
    for name, got, want, rival in outputs:
        assert got.dtype == (args["q"].dtype if name == "out" else torch.float32)
        assert_within_error_rule(got, want, rival, what=name)


def assert_exact_where_scores_are_large(backend: str, case: Case, device: str) -> None:
    """The last bit of lse is 0.001 and more there, and an error of all probabilities of a query. Every query sees the
    same scores, which differ by what is exact in fp32, so that the errors of queries do not cancel."""
    args = case.make(torch.float32)
    args |= {"q": torch.zeros_like(args["q"]), "q_pos": torch.full_like(args["q_pos"], case.slots)}
    steps = (args["kv_pos"] % 8).float()
    for bias in (-1e4, -7777.0, 5432.1, 1e5):
        args["kv_bias"] = steps + bias
        got, want = run(backend, args, device), model(**args)
        assert_close = functools.partial(torch.testing.assert_close, rtol=2e-5, atol=2e-6)
        assert_close(got[0], want[0].float())
        assert_close(got[2], want[2].float())
        assert_close(got[2].sum(1), torch.full((case.batch,), float(case.heads * case.queries)))
