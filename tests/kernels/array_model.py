"""What the tests of `mc_kernels.array` share: kinds of arrays, and what the ops take besides, of the same values."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from splice_model import same_bits
from torch import Tensor

import mc_kernels
from mc_kernels import array

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_numpy(x: Tensor) -> Any:
    """The tensor's memory as NumPy's array; its bfloat16 is ml_dtypes'."""
    if x.dtype != torch.bfloat16:
        return x.numpy()
    import ml_dtypes

    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def as_torch(x: Any) -> Tensor:
    """A result of any kind as a tensor."""
    if isinstance(x, Tensor):
        return x
    values = np.array(x)
    if not values.size:  # of an empty array NumPy's strides are 0
        return torch.empty(values.shape, dtype=getattr(torch, values.dtype.name))
    if values.dtype.name == "bfloat16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def as_jax(x: Tensor) -> Any:
    import jax.numpy as jnp

    return jnp.from_dlpack(x.contiguous())


needs_jax = pytest.mark.skipif(find_spec("jax") is None, reason="JAX is not installed")
# A kind of array: how a tensor becomes one (a view where it may be written), and the class of results.
KINDS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "numpy": (as_numpy, "ndarray"), "torch": (lambda x: x, "Tensor"), "jax": (as_jax, "ArrayImpl"),
}  # fmt: skip
EACH_KIND = pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=needs_jax if name == "jax" else ()) for name in KINDS]
)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def maker(kind: str, dtype: torch.dtype) -> Callable[[Tensor], Any]:
    if kind == "numpy" and dtype == torch.bfloat16 and find_spec("ml_dtypes") is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    return KINDS[kind][0]


def check_result(got: Any, want: Tensor, kind: str) -> None:
    assert type(got).__name__ == KINDS[kind][1]
    assert same_bits(as_torch(got), want)


def plan_of(p: mc_kernels.SplicePlan) -> array.SplicePlan:
    edits = [mc_kernels.Edit(*e) for e in p.edits.tolist()]
    slots = p.slots.numpy() if p.discipline == "slots" else None
    return array.SplicePlan.from_edits(p.length, edits, capacity=p.capacity, discipline=p.discipline, slots=slots)


def rope_of(spec: mc_kernels.RopeSpec | None) -> array.RopeSpec | None:
    if spec is None:
        return None
    return array.RopeSpec(spec.inv_freq.numpy(), spec.interleaved, spec.attention_scaling)


def pool_weights(w: mc_kernels.GistPoolWeights, kind: Callable[[Tensor], Any]) -> array.GistPoolWeights:
    return array.GistPoolWeights(*(kind(x) for x in w.tensors()))


def encode_weights(w: mc_kernels.GistEncodeWeights, kind: Callable[[Tensor], Any]) -> array.GistEncodeWeights:
    named = {name: kind(x) for name, x in w.state_dict().items()}
    return array.GistEncodeWeights(
        named, n_heads=w.n_heads, target_rms=w.target_rms, max_block_size=w.max_block_size, pool=w.pool,
        rope_theta=w.rope_theta,
    )  # fmt: skip


def lens_weights(w: mc_kernels.LensScoreWeights, kind: Callable[[Tensor], Any]) -> array.LensScoreWeights:
    return array.LensScoreWeights({name: kind(x) for name, x in w.state_dict().items()}, n_heads=w.n_heads)
