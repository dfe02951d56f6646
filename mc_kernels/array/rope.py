"""`RopeSpec` in NumPy's arrays."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .views import array


@dataclass(frozen=True, eq=False)
class RopeSpec:
    """How a model rotates its keys, as `mc_kernels.RopeSpec`.

    inv_freq: [D_rot/2] or, where layers differ, [R, D_rot/2] (R: rows of a cache: layers x batch), radians per
        position, fp32 or fp64, any kind of array; kept as contiguous fp64.
    interleaved: pairs dimension 2b with 2b + 1 (GPT-J) instead of b with b + D_rot/2 (Llama in Hugging Face layout).
    attention_scaling: magnitude of a freshly rotated vector (YaRN): multiplies all dimensions, also those beyond D_rot.

    Raises TypeError (dtype) or ValueError (shape, value).
    """

    inv_freq: Any
    interleaved: bool = False
    attention_scaling: float = 1.0

    def __post_init__(self) -> None:
        given = array("inv_freq", self.inv_freq, ("float32", "float64")).numpy()
        if given.ndim not in (1, 2):
            raise ValueError(f"inv_freq: expected shape [D_rot/2] or [R, D_rot/2], got shape {list(given.shape)}")
        if not (self.attention_scaling > 0 and math.isfinite(self.attention_scaling)):
            raise ValueError(f"attention_scaling: expected a positive number, got {self.attention_scaling!r}")
        object.__setattr__(self, "inv_freq", np.array(given, dtype=np.float64, order="C"))

    @classmethod
    def from_theta(cls, theta: float, rotary_dim: int, *, interleaved: bool = False) -> RopeSpec:
        """The plain schedule inv_freq[b] = theta ** (-2b / D_rot), rounded to fp32 as models have it."""
        if rotary_dim <= 0 or rotary_dim % 2:
            raise ValueError(f"rotary_dim: expected a positive even number, got {rotary_dim!r}")
        if not (theta > 0 and math.isfinite(theta)):
            raise ValueError(f"theta: expected a positive number, got {theta!r}")
        exponent = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        return cls((1.0 / theta**exponent).astype(np.float32), interleaved)

    @property
    def half(self) -> int:
        """Half of the rotated dimensions."""
        return int(self.inv_freq.shape[-1])

    def check_head_dim(self, head_dim: int) -> None:
        if 2 * self.half > head_dim:
            raise ValueError(f"rope: expected at most D/2 = {head_dim // 2} frequencies, got {self.half}")
