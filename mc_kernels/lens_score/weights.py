"""Weights of `lens_score` (LensNet)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..checks import ORACLE_DTYPES, check_tensor
from ..weight_shapes import LENS_SCORE as SHAPES
from ..weight_shapes import check_lens_score


@dataclass(frozen=True, eq=False)
class LensScoreWeights:
    """A LensNet: E the width of entries and queries, d its own, H = n_heads of width d/H, P read passes. Linear layers
    are stored [out, in], those of the passes stacked.

    w_in: [d, E] brings the queries in.
    read_norm, mlp_norm: [P, d] RMS-norm gains. read_q, read_out: [P, d, d]. read_k, read_v: [P, d, E].
        mlp_gate_up: [P, 2 f, d] gate rows first. mlp_down: [P, d, f].
    score_norm: [d]. score_q: [d, E] queries of the entries. score_k: [d, d] keys of the enriched queries.
        score_v: [H dv, d] their values, dv small.
    direct: [J, E] projections of an entry that the head sees as they are, J <= 16.
    head_in: [hidden, X], X = H dv + H + J + F in this order (attended values, match, direct, features).
        head_bias: [hidden]. head_out: [2, hidden] and head_out_bias: [2], zero in an untrained net.
    n_heads: H, divides d and H dv.

    All tensors share one dtype (fp32, bf16, fp16; fp64 for the oracle) and device and are not copied.
    Raises TypeError (dtype, device) or ValueError (shape, value), naming the field.
    """

    w_in: Tensor
    read_norm: Tensor
    read_q: Tensor
    read_k: Tensor
    read_v: Tensor
    read_out: Tensor
    mlp_norm: Tensor
    mlp_gate_up: Tensor
    mlp_down: Tensor
    score_norm: Tensor
    score_q: Tensor
    score_k: Tensor
    score_v: Tensor
    direct: Tensor
    head_in: Tensor
    head_bias: Tensor
    head_out: Tensor
    head_out_bias: Tensor
    n_heads: int

    def __post_init__(self) -> None:
        named = dict(zip(SHAPES, self.tensors(), strict=True))
        for name, x in named.items():
            check_tensor(f"weights.{name}", x, ORACLE_DTYPES)
        check_lens_score(named, self.n_heads)

    @classmethod
    def init(
        cls,
        embed_dim: int,
        n_features: int,
        *,
        width: int = 512,
        n_heads: int = 8,
        n_passes: int = 1,
        ffn_dim: int = 512,
        head_value_dim: int = 8,
        n_direct: int = 8,
        head_dim: int = 64,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> LensScoreWeights:
        """An untrained net: every score is exactly 0 (the head's last layer is zero).

        n_features: F. head_value_dim: dv. n_direct: J. head_dim: hidden width of the head. generator: on the CPU; the
        numbers are drawn there in fp32, so that they are the same for every dtype and device.
        """
        d, p, hv = width, n_passes, n_heads * head_value_dim
        x = hv + n_heads + n_direct + n_features

        def linear(*shape: int, scale: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
            return drawn * (scale * max(shape[-1], 1) ** -0.5)

        deep = (2 * max(p, 1)) ** -0.5  # keeps the residual stream's size independent of the number of passes
        tensors = (
            linear(d, embed_dim),
            torch.ones(p, d),
            linear(p, d, d),
            linear(p, d, embed_dim),
            linear(p, d, embed_dim),
            linear(p, d, d, scale=deep),
            torch.ones(p, d),
            linear(p, 2 * ffn_dim, d),
            linear(p, d, ffn_dim, scale=deep),
            torch.ones(d),
            linear(d, embed_dim),
            linear(d, d),
            linear(hv, d),
            linear(n_direct, embed_dim),
            linear(head_dim, x),
            torch.zeros(head_dim),
            torch.zeros(2, head_dim),
            torch.zeros(2),
        )
        device = torch.get_default_device() if device is None else device
        named: dict[str, Any] = {n: t.to(device=device, dtype=dtype) for n, t in zip(SHAPES, tensors, strict=True)}
        return cls(**named, n_heads=n_heads)

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor fields in the order of the op's schema."""
        return tuple(getattr(self, name) for name in SHAPES)

    def with_tensors(self, *tensors: Tensor) -> LensScoreWeights:
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
    def n_passes(self) -> int:
        return self.read_q.shape[0]

    @property
    def n_features(self) -> int:
        """F: what the head's input leaves after values, match and direct projections."""
        return self.head_in.shape[1] - self.score_v.shape[0] - self.n_heads - self.direct.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> LensScoreWeights:
        """The same weights on another device, in another dtype or both, as `Tensor.to` is asked for them; fields that
        already fit are shared."""
        return self.with_tensors(*(x.to(*args, **kwargs) for x in self.tensors()))

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Detached contiguous tensors by name, as safetensors takes them."""
        return {prefix + name: x.detach().contiguous() for name, x in zip(SHAPES, self.tensors(), strict=True)}

    def metadata(self, prefix: str = "") -> dict[str, str]:
        """Hyperparameters as strings, for the metadata of a safetensors file."""
        return {prefix + "n_heads": str(self.n_heads)}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], metadata: Mapping[str, str], prefix: str = ""
    ) -> LensScoreWeights:
        """Weights from what `state_dict(prefix)` and `metadata(prefix)` gave (other prefixes may be there too).

        Raises ValueError for a missing or unknown name, a wrong shape, or a hyperparameter that does not parse.
        """
        have = {key.removeprefix(prefix) for key in state if key.startswith(prefix)}
        if have != set(SHAPES):
            wanted, got = ", ".join(sorted(SHAPES)), ", ".join(sorted(have)) or "none"
            raise ValueError(f"state: expected the entries {wanted} under prefix {prefix!r}, got {got}")
        if prefix + "n_heads" not in metadata:
            raise ValueError(f"metadata: expected n_heads under prefix {prefix!r}, got {dict(metadata)}")
        named: dict[str, Any] = {name: state[prefix + name] for name in SHAPES}
        return cls(**named, n_heads=int(metadata[prefix + "n_heads"]))
