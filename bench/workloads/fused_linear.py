"""`fused_linear`: one linear map of a decode step with its norm, activation and residual. Checked whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mc_kernels import fused_linear
from mc_kernels.packed_weight import unpack_weight

from .base import Check, Workload, error_rule

Args = dict[str, Any]


def plain_linear(args: Args) -> Tensor:
    """As model code writes it: a call for the norm, the product, the activation and the residual each."""
    x, weight = args["x"], args["weight"]
    if args.get("norm") is not None:
        x = F.rms_norm(x, (x.shape[-1],), args["norm"], args["eps"])
    y = F.linear(x, weight, args.get("bias"))
    if args["swiglu"]:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    residual = args.get("residual")
    return y if residual is None else residual + y


class FusedLinear(Workload):
    op = "fused_linear"

    @property
    def rows(self) -> int:
        return int(self.case.rows)

    def ours(self, inputs: Args, backend: str) -> Tensor:
        return fused_linear(**inputs, backend=backend)

    def plain(self, inputs: Args) -> Tensor:
        return plain_linear(inputs)

    def expect(self, inputs: Args) -> Callable[[Any], Check]:
        given = dict(inputs)
        packed = given.pop("packed", None)
        if packed is not None:  # what it stands for is the weight before it was rounded
            given["weight"] = unpack_weight(packed, *given["weight"].shape)
        wide: Args = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
        exact = fused_linear(**wide, backend="ref")
        plain = plain_linear(inputs)
        return lambda out: error_rule([out], [exact], [plain])
