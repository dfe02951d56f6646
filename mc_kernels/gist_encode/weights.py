"""Weights of `gist_encode` (GistNet on embeddings)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import ORACLE_DTYPES, check_shape, check_tensor
from ..weight_shapes import GIST_ENCODE as SHAPES
from ..weight_shapes import check_gist_encode


@dataclass(frozen=True, eq=False)
class GistEncodeWeights:
    """A GistNet: E the base model's embedding width, Eg the net's own, F its feed-forward width. Linear layers are
    stored [out, in], per-layer weights stacked, so that a native backend reads them as they are.

    mu: [E] mean embedding of the base model's vocabulary, taken off the mean of a block of tokens (level 1).
    w_in: [Eg, E]. level_emb: [n_levels, Eg], row level - 1 (higher levels use the last row).
    attn_norm, ffn_norm: [layers, Eg] RMS-norm gains. qkv: [layers, 3 Eg, Eg] rows of queries, keys, values in this
        order, heads contiguous. attn_out: [layers, Eg, Eg]. gate_up: [layers, 2 F, Eg] gate rows first.
        down: [layers, Eg, F].
    final_norm: [Eg]. pool_q: [G, Eg] learned queries (`softmax`) or the class token (`cls`, G = 1); for `mean` [1, Eg],
        unused. w_out: [E, Eg], zero in an untrained net. gain: [1], 1 in an untrained net.
    n_heads: attention heads; Eg / n_heads is even. pool: `softmax` | `mean` | `cls`. rope_theta: base of the positions
        inside a window. target_rms: RMS of the base model's embeddings, which gists are brought to.
        max_block_size: largest K that the net takes.

    All tensors share one dtype (fp32, bf16, fp16; fp64 for the oracle) and device and are not copied.
    Raises TypeError (dtype, device) or ValueError (shape, value), naming the field.
    """

    mu: Tensor
    w_in: Tensor
    level_emb: Tensor
    attn_norm: Tensor
    qkv: Tensor
    attn_out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor
    final_norm: Tensor
    pool_q: Tensor
    w_out: Tensor
    gain: Tensor
    n_heads: int
    target_rms: float
    max_block_size: int = 128
    pool: str = "softmax"
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        named = dict(zip(SHAPES, self.tensors(), strict=True))
        for name, x in named.items():
            check_tensor(f"weights.{name}", x, ORACLE_DTYPES)
        check_gist_encode(named, self.n_heads, self.pool, self.rope_theta, self.target_rms, self.max_block_size)

    @classmethod
    def init(
        cls,
        embed_dim: int,
        width: int,
        layers: int,
        n_heads: int,
        ffn_dim: int,
        *,
        n_gists: int = 1,
        max_block_size: int = 128,
        n_levels: int = 4,
        mu: Tensor | None = None,
        target_rms: float = 1.0,
        pool: str = "softmax",
        rope_theta: float = 10000.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> GistEncodeWeights:
        """An untrained net: its output is exactly the centred mean at RMS `target_rms` (`w_out` is zero, `gain` one).

        mu: [E] or None for zero. generator: on the CPU; the numbers are drawn there in fp32, so that they are the same
        for every dtype and device.
        """

        def normal(*shape: int, std: float) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * std

        if mu is not None:
            check_tensor("mu", mu, ORACLE_DTYPES)
            check_shape("mu", mu, (embed_dim,), {})
        deep = (2 * max(layers, 1)) ** -0.5  # keeps the residual stream's size independent of the depth
        tensors = (
            torch.zeros(embed_dim) if mu is None else mu.detach().cpu(),
            normal(width, embed_dim, std=embed_dim**-0.5),
            normal(n_levels, width, std=0.02),
            torch.ones(layers, width),
            normal(layers, 3 * width, width, std=width**-0.5),
            normal(layers, width, width, std=deep * width**-0.5),
            torch.ones(layers, width),
            normal(layers, 2 * ffn_dim, width, std=width**-0.5),
            normal(layers, width, ffn_dim, std=deep * ffn_dim**-0.5),
            torch.ones(width),
            normal(n_gists, width, std=1.0),
            torch.zeros(embed_dim, width),
            torch.ones(1),
        )
        device = torch.get_default_device() if device is None else device
        named: dict[str, Any] = {
            name: x.to(device=device, dtype=dtype) for name, x in zip(SHAPES, tensors, strict=True)
        }
        return cls(
            **named,
            n_heads=n_heads,
            target_rms=target_rms,
            max_block_size=max_block_size,
            pool=pool,
            rope_theta=rope_theta,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor fields in the order of the op's schema."""
        return tuple(getattr(self, name) for name in SHAPES)

    def with_tensors(self, *tensors: Tensor) -> GistEncodeWeights:
        """The same hyperparameters on other tensors, given in the order of `tensors()`."""
        named: dict[str, Any] = dict(zip(SHAPES, tensors, strict=True))
        return replace(self, **named)

    @property
    def embed_dim(self) -> int:
        return self.w_in.shape[1]

    @property
    def width(self) -> int:
        return self.w_in.shape[0]

    @property
    def n_gists(self) -> int:
        return self.pool_q.shape[0]

    @property
    def n_levels(self) -> int:
        return self.level_emb.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> GistEncodeWeights:
        """The same weights on another device, in another dtype or both, as `Tensor.to` is asked for them; fields that
        already fit are shared."""
        return self.with_tensors(*(x.to(*args, **kwargs) for x in self.tensors()))

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Detached contiguous tensors by name, as safetensors takes them."""
        return {prefix + name: x.detach().contiguous() for name, x in zip(SHAPES, self.tensors(), strict=True)}

    def metadata(self, prefix: str = "") -> dict[str, str]:
        """Hyperparameters as strings, for the metadata of a safetensors file."""
        return {prefix + f.name: str(getattr(self, f.name)) for f in fields(self) if f.name not in SHAPES}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str = ""
    ) -> GistEncodeWeights:
        """Weights from what `state_dict(prefix)` and `metadata(prefix)` gave (other prefixes may be there too).

        Raises ValueError for a missing or unknown name, a wrong shape, or a hyperparameter that does not parse.
        """
        have = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        if have != set(SHAPES):
            wanted, got = ", ".join(sorted(SHAPES)), ", ".join(sorted(have)) or "none"
            raise ValueError(f"state: expected the entries {wanted} under prefix {prefix!r}, got {got}")
        parse = {"n_heads": int, "target_rms": float, "max_block_size": int, "pool": str, "rope_theta": float}
        if missing := [name for name in parse if prefix + name not in metadata]:
            raise ValueError(f"metadata: expected {', '.join(missing)} under prefix {prefix!r}, got {dict(metadata)}")
        hyper: dict[str, Any] = {name: convert(metadata[prefix + name]) for name, convert in parse.items()}
        return cls(**{name: state[prefix + name] for name in SHAPES} | hyper)
