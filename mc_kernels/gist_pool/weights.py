"""Weights of `gist_pool`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..checks import ORACLE_DTYPES, check_tensor
from ..weight_shapes import GIST_POOL, check_gist_pool


@dataclass(frozen=True, eq=False)
class GistPoolWeights:
    """One level's learned pooling, for every layer and KV head of the base model.

    w: [L, Hkv, G, 2D] scores the normalised [key; value] of a child, one row per gist.
    b: [L, Hkv, G, K] scores the place of a child in its block.
    m: [L, Hkv, 2D, 2D] linear residual on the pooled vector, applied from the right (y @ m).
    c: [L, Hkv, 2D] constant residual.
    All of one dtype (fp32, bf16, fp16; fp64 for the oracle) and on one device. The tensors are not copied.

    Raises TypeError (dtype, device) or ValueError (shape), naming the field.
    """

    w: Tensor
    b: Tensor
    m: Tensor
    c: Tensor

    def __post_init__(self) -> None:
        named = dict(zip(GIST_POOL, self.tensors(), strict=True))
        for name, x in named.items():
            check_tensor(f"weights.{name}", x, ORACLE_DTYPES)
        check_gist_pool(named)

    @classmethod
    def zeros(
        cls,
        layers: int,
        kv_heads: int,
        n_gists: int,
        block_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GistPoolWeights:
        """Untrained weights (L, Hkv, G, K, D): every gist is the mean of its block's keys and values."""

        def new(*shape: int) -> Tensor:
            return torch.zeros(layers, kv_heads, *shape, dtype=dtype, device=device)

        both = 2 * head_dim
        return cls(new(n_gists, both), new(n_gists, block_size), new(both, both), new(both))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields in the order of the op's schema."""
        return self.w, self.b, self.m, self.c

    @property
    def layers(self) -> int:
        return self.w.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.w.shape[1]

    @property
    def n_gists(self) -> int:
        return self.w.shape[2]

    @property
    def block_size(self) -> int:
        return self.b.shape[3]

    @property
    def head_dim(self) -> int:
        return self.c.shape[2] // 2

    def to(self, *args: Any, **kwargs: Any) -> GistPoolWeights:
        """The same weights on another device, in another dtype or both, as `Tensor.to` is asked for them; fields that
        already fit are shared."""
        return GistPoolWeights(*(x.to(*args, **kwargs) for x in self.tensors()))

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Detached contiguous tensors by name, as safetensors takes them."""
        return {prefix + f.name: getattr(self, f.name).detach().contiguous() for f in fields(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], prefix: str = "") -> GistPoolWeights:
        """Weights from the entries of `state` whose name starts with `prefix`.

        Raises ValueError if one of w, b, m, c is missing, if another name carries the prefix, or for a wrong shape.
        """
        names = {f.name for f in fields(cls)}
        have = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        if have != names:
            wanted, got = ", ".join(sorted(names)), ", ".join(sorted(have)) or "none"
            raise ValueError(f"state: expected the entries {wanted} under prefix {prefix!r}, got {got}")
        return cls(**{name: state[prefix + name] for name in names})
