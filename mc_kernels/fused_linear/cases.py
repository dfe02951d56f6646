"""Inputs, bytes and FLOPs of `fused_linear`, for tests and benchmarks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..packed_weight import BLOCK, pack_weight, packed_shape, unpack_weight


@dataclass(frozen=True)
class Case:
    """One call: `rows` rows of `inputs` elements through a weight of `weight_rows` rows. bits: in bf16 the weight is
    given packed too, in codes of so many bits; 0: it is not."""

    name: str
    rows: int
    inputs: int
    weight_rows: int
    norm: bool = False
    bias: bool = False
    swiglu: bool = False
    residual: bool = False
    bits: int = 0

    @property
    def outputs(self) -> int:
        return self.weight_rows // 2 if self.swiglu else self.weight_rows

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `fused_linear`, all in `dtype`; outputs of the size of 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            x = torch.randn(shape, generator=generator) * std + mean
            return x.to(device=device, dtype=dtype)

        args: dict[str, Any] = {
            "x": normal(self.rows, self.inputs),
            "weight": normal(self.weight_rows, self.inputs, std=max(self.inputs, 1) ** -0.5),
            "swiglu": self.swiglu,
        }
        if self.bits and dtype == torch.bfloat16:
            args |= self._packed(generator, device)
        if self.norm:
            args |= {"norm": normal(self.inputs, mean=1.0, std=0.2), "eps": 1e-5}
        if self.bias:
            args["bias"] = normal(self.weight_rows)
        if self.residual:
            args["residual"] = normal(self.rows, self.outputs)
        return args

    def _packed(self, generator: torch.Generator, device: torch.device | str) -> dict[str, Tensor]:
        shape, blocks = (self.weight_rows, self.inputs), (self.weight_rows, self.inputs // BLOCK)
        codes = torch.randint(0, 2**self.bits, shape, generator=generator, dtype=torch.uint8)
        scale = 3.5 * 2.0**-self.bits * self.inputs**-0.5 * (0.5 + torch.rand(blocks, generator=generator))
        packed = pack_weight(codes, scale, -0.5 * (2**self.bits - 1) * scale, bits=self.bits)
        return {"packed": packed.to(device), "weight": unpack_weight(packed, *shape).to(device, torch.bfloat16)}

    def bytes(self, dtype: torch.dtype) -> int:
        """Least traffic: every input read once, the output written once."""
        vectors = self.norm * self.inputs + self.bias * self.weight_rows
        rows = self.rows * (self.inputs + self.outputs * (2 if self.residual else 1))
        weight = dtype.itemsize * self.weight_rows * self.inputs
        if self.bits and dtype == torch.bfloat16:
            weight = math.prod(packed_shape(self.weight_rows, self.inputs, self.bits))
        return weight + dtype.itemsize * (vectors + rows)

    def flops(self) -> int:
        """Of the product."""
        return 2 * self.rows * self.weight_rows * self.inputs


# embedding, rows of qkv, columns of out, FFN width, vocabulary
_MODELS = {
    "SmolLM2-135M": (576, 960, 576, 1536, 49_152),
    "Llama-3.2-1B": (2048, 3072, 2048, 8192, 128_256),
    "Llama-3-8B": (4096, 6144, 4096, 14_336, 128_256),
}


def _of(model: str, rows: int) -> list[Case]:
    embed, qkv, heads, ffn, vocabulary = _MODELS[model]
    at = f"{model}/rows{rows}"
    return [
        Case(f"{at}/qkv", rows, embed, qkv, norm=True),
        Case(f"{at}/out", rows, heads, embed, residual=True),
        Case(f"{at}/gate-up", rows, embed, 2 * ffn, norm=True, swiglu=True),
        Case(f"{at}/down", rows, ffn, embed, residual=True),
        Case(f"{at}/head", rows, embed, vocabulary),
    ]


def _packed(model: str) -> list[Case]:
    embed, _, _, ffn, vocabulary = _MODELS[model]
    at = f"{model}/rows1"
    return [
        Case(f"{at}/gate-up-4-bit", 1, embed, 2 * ffn, norm=True, swiglu=True, bits=4),
        Case(f"{at}/down-4-bit", 1, ffn, embed, residual=True, bits=4),
        Case(f"{at}/head-8-bit", 1, embed, vocabulary, bits=8),
    ]


CASES = [case for model in _MODELS for rows in (1, 8) for case in _of(model, rows)]
CASES += [case for model in _MODELS for case in _packed(model)]
SMALL = [
    Case("small/plain", 1, 32, 16),
    Case("small/norm", 3, 64, 40, norm=True),
    Case("small/swiglu", 2, 48, 36, norm=True, swiglu=True),
    Case("small/residual", 5, 33, 19, residual=True),
    Case("small/all", 17, 70, 134, norm=True, bias=True, swiglu=True, residual=True),
    Case("small/bias", 4, 7, 3, bias=True),
    Case("small/one", 1, 1, 1),
]
EMPTY = [
    Case("empty/rows", 0, 8, 4, norm=True, residual=True),
    Case("empty/outputs", 2, 8, 0, bias=True),
    Case("empty/inputs", 2, 0, 6, norm=True, bias=True, swiglu=True),
]
