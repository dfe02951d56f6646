"""Cases of `context_attention`: inputs, minimal traffic and FLOPs. Tests use `SMALL`, benchmarks `CASES`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import FP8, accumulate_dtype
from ..rope import RopeSpec

# query heads, KV heads, head dimension, rope theta
MODELS = {
    "SmolLM2-135M": (9, 3, 64, 100_000.0),
    "Llama-3.2-1B": (32, 8, 64, 500_000.0),
    "Llama-3-8B": (32, 8, 128, 500_000.0),
}


def stored(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, Hkv, S, D] in fp8 and its scales [Hkv]: each head's largest element becomes the largest of fp8."""
    scale = x.float().abs().amax(dim=(0, 2, 3)) / torch.finfo(FP8).max
    return (x.float() / scale[:, None, None]).to(FP8), scale


@dataclass(frozen=True)
class Case:
    """The last `queries` of `slots` entries attend to all of them, causally; entries lie in slots in a random order.

    queries = 1 is a decode step, more is a prefill chunk. features: pass sigma and kv_bias too. fp8: the cache is of
    it.
    """

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    slots: int
    queries: int = 1
    theta: float = 10_000.0
    batch: int = 1
    features: bool = False
    fp8: bool = False

    def make(self, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `context_attention`; k and v are views of one allocation [2, B, Hkv, S, D]."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float32, device=device, generator=generator).to(dtype)

        cache = normal(2, self.batch, self.kv_heads, self.slots, self.head_dim)
        order = torch.rand(self.batch, self.slots, device=device, generator=generator).argsort(dim=1)
        last = torch.arange(self.slots - self.queries, self.slots, device=device)
        args: dict[str, Any] = {
            "q": normal(self.batch, self.heads, self.queries, self.head_dim), "k": cache[0], "v": cache[1],
            "q_pos": last.expand(self.batch, -1).contiguous(), "kv_pos": order,
            "rope": RopeSpec.from_theta(self.theta, self.head_dim),
        }  # fmt: skip
        if self.features:
            acc = accumulate_dtype(dtype)
            args["sigma"] = normal(self.batch, self.slots).abs().to(acc) * 4
            args["kv_bias"] = normal(self.batch, self.slots).to(acc)
        if self.fp8:
            for name in ("k", "v"):
                args[name], args[f"{name}_scale"] = stored(args[name])
        return args

    def bytes(self, dtype: torch.dtype) -> int:
        """Minimal traffic: K and V once, q once, out once, int64 positions, fp32 sigma, bias and scales."""
        cache = 2 * self.kv_heads * self.slots * self.head_dim
        queries = 2 * self.heads * self.queries * self.head_dim
        per_slot = 8 + (8 if self.features else 0)
        elements = cache * (FP8.itemsize if self.fp8 else dtype.itemsize) + queries * dtype.itemsize
        scales = 8 * self.kv_heads if self.fp8 else 0
        return self.batch * (elements + per_slot * self.slots + 8 * self.queries) + scales

    def flops(self) -> int:
        """Two products, q k and p v, over the visible pairs (rotation and softmax not counted)."""
        visible = self.queries * self.slots - self.queries * (self.queries - 1) // 2
        return 4 * self.batch * self.heads * visible * self.head_dim


CASES = [
    Case(f"{model}/{slots // 1024}k/{suffix}", heads, kv_heads, dim, slots, queries, theta)
    for model, (heads, kv_heads, dim, theta) in MODELS.items()
    for slots in (2048, 8192, 32768)
    for queries, suffix in ((1, "decode"), (512, "prefill512"))
]
CASES += [
    Case(f"{model}/{slots // 1024}k/decode-fp8", heads, kv_heads, dim, slots, 1, theta, fp8=True)
    for model, (heads, kv_heads, dim, theta) in MODELS.items()
    for slots in (8192, 32768)
]
SMALL = [
    Case("small-decode", 6, 2, 16, 37, 1, batch=2),
    Case("small-prefill", 6, 2, 16, 37, 13, batch=2),
    Case("small-features", 4, 4, 8, 29, 7, batch=2, features=True),
    Case("small-one-slot", 2, 1, 4, 1, 1),
]
