"""What the tests of `mc_kernels.array` share: the ops on torch's tensors, called with other arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mc_kernels
from mc_kernels import array


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
