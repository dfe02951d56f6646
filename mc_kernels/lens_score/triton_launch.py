"""How a launch of a Triton kernel is written down before it happens: run it, or compile it ahead of time.

The host code of `lens_score` lists its launches from the shapes, dtypes and strides of its arguments alone. On real
tensors they run; on meta tensors they say what has to be compiled, so the resource report cannot drift from what runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..triton_report import Compilation
from ..triton_specialisation import specialise

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One launch. arguments: tensors, ints and floats by name (None: not given); constants: the constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """On the current stream of the current device, which is to be the tensors'."""
        if 0 not in self.grid:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)

    def compilation(self, shape: str) -> Compilation:
        """What Triton would compile for these arguments, with its specialisation of 1 and of multiples of 16."""
        signature, fixed, aligned = specialise(self.kernel, self.arguments, _TYPES)
        constants = {**self.constants, **fixed}
        signature |= dict.fromkeys(constants, "constexpr")
        return Compilation(shape, self.kernel, signature, constants, self.num_warps, self.num_stages, aligned)
