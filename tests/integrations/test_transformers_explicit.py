"""The attention that is written out: where `context_attention` does the same, the two agree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_models import attached, build, random_ids, run
from torch import Tensor

from mc_kernels import RopeSpec, context_attention
from mc_kernels.integrations.transformers import WorkingContextCache
from mc_kernels.integrations.transformers.explicit import explicit_attention

ROPE = RopeSpec.from_theta(500.0, 16)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Any]:
    """q [2, 4, 3, 16], k, v [2, 2, 40, 16], and a cache of 40 slots in no order, of which some are empty."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, n, 16, generator=generator) for heads, n in ((4, 3), (2, 40), (2, 40)))
    kv_pos = torch.stack([torch.randperm(40, generator=generator) for _ in range(2)])
    kv_pos[:, 5:9] = -1
    bias = torch.randn(2, 40, generator=generator)
    q_pos = torch.tensor([[39, 20, -1], [39, 40, 41]])
    return q, k, v, SimpleNamespace(q_pos=q_pos, kv_pos=kv_pos, kv_bias=bias, sigma=None, masses=[])


@pytest.mark.parametrize("softcap", [None, 1e5], ids=["plain", "cap far off"])
def test_outputs_and_mass_are_those_of_context_attention(softcap: float | None) -> None:
    q, k, v, cache = drawn()
    out, mass = explicit_attention(q, k, v, ROPE, cache, window=None, scale=0.3, softcap=softcap, sinks=None)
    want, want_mass = context_attention(
        q, k, v, cache.q_pos, cache.kv_pos, ROPE, kv_bias=cache.kv_bias, scale=0.3, return_mass=True
    )
    torch.testing.assert_close(out, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mass, want_mass, atol=2e-5, rtol=1e-5)
    assert not out[0, :, 2].any(), "a query that sees nothing gives zeros"
    cache.masses = None
    again, nothing = explicit_attention(q, k, v, ROPE, cache, window=None, scale=0.3, softcap=softcap, sinks=None)
    torch.testing.assert_close(again, want, atol=2e-5, rtol=1e-5)
    assert nothing is None


def test_a_sink_is_a_slot_without_a_value() -> None:
    q, k, v, cache = drawn()
    sinks = torch.tensor([-3.0, 0.0, 2.0, 60.0])
    out, mass = explicit_attention(q, k, v, None, cache, window=None, scale=None, softcap=None, sinks=sinks)
    plain, lse, _ = context_attention(
        q, k, v, cache.q_pos, cache.kv_pos, None, kv_bias=cache.kv_bias, return_lse=True, return_mass=True
    )
    share = torch.sigmoid(lse - sinks[:, None])
    torch.testing.assert_close(out, plain * share[..., None], atol=2e-5, rtol=1e-5)
    assert mass is not None
    torch.testing.assert_close(mass.sum(1), share.sum((1, 2)), atol=2e-5, rtol=1e-5)
    assert not out[:, 3].abs().gt(1e-6).any()


@pytest.mark.parametrize("case", ["gemma2", "gpt-oss"])
def test_mass_is_given_for_every_layer(case: str) -> None:
    """What heads and queries give to slots, at most one each: a sink takes its share."""
    with attached(build(case)) as model:
        cache = WorkingContextCache(model, 40)
        cache.masses = []
        logits = run(model, cache, random_ids(1, 30))
        masses, cache.masses = cache.masses, None
        other = WorkingContextCache(model, 40)
        torch.testing.assert_close(run(model, other, random_ids(1, 30)), logits, atol=1e-4, rtol=1e-4)
    assert [tuple(mass.shape) for mass in masses] == [(1, 30)] * 3
    for mass in masses:
        assert float(mass.sum()) == pytest.approx(4 * 30, abs=1e-2) if case == "gemma2" else mass.sum() < 0.99 * 4 * 30


def test_spread_positions_are_refused() -> None:
    q, k, v, cache = drawn()
    cache.sigma = torch.ones(2, 40)
    with pytest.raises(ValueError, match="expected no sigma"):
        explicit_attention(q, k, v, ROPE, cache, window=None, scale=None, softcap=50.0, sinks=None)
