"""Rotary position embedding from explicit positions (Su et al. 2021, RoFormer).

A head's first D_rot dimensions are D_rot/2 pairs; pair b at position p is rotated by the angle p * inv_freq[b].
`interleaved=False` pairs dimension b with b + D_rot/2 (GPT-NeoX, Llama in Hugging Face layout), `True` pairs 2b with
2b + 1 (GPT-J). Dimensions beyond D_rot are not rotated (partial rotary). `attention_scaling` is YaRN's magnitude
(Peng et al. 2023): it multiplies a *fresh* rotation of queries and keys, all dimensions of them, never a re-rotation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .checks import accumulate_dtype, check_tensor, describe

TWO_PI = 2.0 * math.pi


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """How a model rotates its keys.

    inv_freq: [D_rot/2] or, where layers differ, [R, D_rot/2] (R: rows of a cache: layers x batch), radians per
        position, fp32 or fp64.
    interleaved: pairs dimension 2b with 2b + 1 (GPT-J) instead of b with b + D_rot/2 (Llama in Hugging Face layout).
    attention_scaling: magnitude of a freshly rotated vector (YaRN): multiplies all dimensions, also those beyond D_rot.
        Models that are partially rotary and scale the rotated dimensions alone (Hugging Face's Phi-4-mini) are not
        served by it.
    """

    inv_freq: Tensor
    interleaved: bool = False
    attention_scaling: float = 1.0
    _per_device: dict[Any, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        check_tensor("inv_freq", self.inv_freq, (torch.float32, torch.float64))
        if self.inv_freq.dim() not in (1, 2):
            raise ValueError(f"inv_freq: expected shape [D_rot/2] or [R, D_rot/2], got {describe(self.inv_freq)}")
        if not (self.attention_scaling > 0 and math.isfinite(self.attention_scaling)):
            raise ValueError(f"attention_scaling: expected a positive number, got {self.attention_scaling!r}")

    @classmethod
    def from_theta(cls, theta: float, rotary_dim: int, *, interleaved: bool = False) -> RopeSpec:
        """The plain schedule inv_freq[b] = theta ** (-2b / D_rot)."""
        if rotary_dim <= 0 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected a positive even number, got {rotary_dim!r}")
        if not (theta > 0 and math.isfinite(theta)):
            raise ValueError(f"theta: expected a positive number, got {theta!r}")
        exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
        return cls((1.0 / theta**exponent).float(), interleaved)

    @property
    def rotary_dim(self) -> int:
        return 2 * self.inv_freq.shape[-1]

    def inv_freq_on(self, device: torch.device) -> Tensor:
        """`inv_freq` on a device; copied once."""
        if self.inv_freq.device == device:
            return self.inv_freq
        if device not in self._per_device:
            self._per_device[device] = self.inv_freq.to(device)
        return self._per_device[device]

    def check_head_dim(self, head_dim: int) -> None:
        if self.rotary_dim > head_dim:
            raise ValueError(f"rope: expected at most D/2 = {head_dim // 2} frequencies, got {self.rotary_dim // 2}")


def phases(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """cos and sin [*positions.shape, D_rot/2] (for a 2-D `inv_freq` [R, D_rot/2]: [R, *positions.shape, D_rot/2]).

    The angle is reduced to one turn in fp64: in fp32 a position of 1e7 would carry a phase error of half a radian.
    """
    freq = inv_freq.to(torch.float64)
    if freq.dim() == 2:
        freq = freq.view(freq.shape[0], *(1,) * positions.dim(), freq.shape[1])
    turns = positions.to(torch.float64).unsqueeze(-1) * (freq / TWO_PI)
    angle = ((turns - turns.round()) * TWO_PI).to(dtype)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of `x [..., D]` by the given phases `[..., D_rot/2]` (broadcast); result in cos' dtype."""
    half = cos.shape[-1]
    x = x.to(cos.dtype)
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = rot[..., 0::2], rot[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = rot[..., :half], rot[..., half:]
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((out, rest), dim=-1) if rest.shape[-1] else out


def apply_rope(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    """Fresh rotation of `x [..., S, D]` at `positions [..., S]` (broadcast over what precedes), in x's dtype.

    Computes in fp32 (fp64 for fp64 input). A per-row `inv_freq [R, D_rot/2]` needs `x [R, ..., S, D]`.
    """
    spec.check_head_dim(x.shape[-1])
    cos, sin = phases(positions, spec.inv_freq_on(x.device), accumulate_dtype(x.dtype))
    if spec.inv_freq.dim() == 2:
        while cos.dim() < x.dim():
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return (rotate(x, cos, sin, spec.interleaved) * spec.attention_scaling).to(x.dtype)
