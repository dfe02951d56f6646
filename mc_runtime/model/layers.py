"""The parts of a decoder's layer, frozen: linear maps, norms, attention, feed-forward. The formulas: `decoder.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_kernels import RopeSpec, context_attention, fused_linear
from mc_kernels.packed_weight import PackedWeight
from mc_runtime.huge_pages import HugePages
from mc_runtime.model.config import ModelConfig
from mc_runtime.model.stores import KVStore


class Like(NamedTuple):
    """Where and in which precision parameters live."""

    dtype: torch.dtype
    device: torch.device | None
    memory: HugePages

    def parameter(self, *shape: int) -> nn.Parameter:
        """Frozen and not set yet."""
        return nn.Parameter(self.memory.zeros(shape, self.dtype, self.device), requires_grad=False)


class Linear(nn.Module):
    """x W^T + b, without the time that `nn.Linear` takes to draw weights that are then read from a file."""

    def __init__(self, inputs: int, outputs: int, like: Like, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = like.parameter(outputs, inputs)
        self.bias = like.parameter(outputs) if bias else None
        self.packed: PackedWeight | None = None  # from a quantised file; to be set before the first forward

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def fused(
        self, x: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """With what a layer does before and after it, see `mc_kernels.fused_linear`."""
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        packed = None if self.packed is None else self.packed.of(self.weight)
        return fused_linear(
            x, self.weight, packed=packed, norm=gain, eps=eps, bias=self.bias, swiglu=swiglu, residual=residual
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, accumulated in fp32 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float, like: Like) -> None:
        super().__init__()
        self.weight = like.parameter(dim)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention of one layer; `qkv` rows: all query heads, all key heads, all value heads."""

    def __init__(self, config: ModelConfig, layer: int, like: Like) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.head_dim
        rows = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        self.qkv = Linear(config.embed_dim, rows, like, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * config.head_dim, config.embed_dim, like, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps, like) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps, like) if config.qk_norm else None

    def forward(
        self, x: Tensor, positions: Tensor, store: KVStore, rope: RopeSpec, return_mass: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, E] (normed) -> ([B, T, E], mass [B, S] or None)."""
        attended, mass = self.attend(self.qkv(x), positions, store, rope, return_mass)
        return self.out(attended), mass

    def attend(
        self, qkv: Tensor, positions: Tensor, store: KVStore, rope: RopeSpec, return_mass: bool
    ) -> tuple[Tensor, Tensor | None]:
        """qkv [B, T, (Hq + 2 Hkv) D] -> ([B, T, Hq D], mass [B, S] or None)."""
        batch, length, _ = qkv.shape
        groups = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        heads = qkv.view(batch, length, sum(groups), self.head_dim).transpose(1, 2)  # [B, Hq + 2 Hkv, T, D]
        q, k, v = heads.split(groups, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        keys, values, kv_pos = store.update(self.layer, k, v)
        result: Any = context_attention(
            q,
            keys,
            values,
            positions,
            kv_pos,
            rope,
            sigma=getattr(store, "sigma", None),
            kv_bias=getattr(store, "kv_bias", None),
            return_mass=return_mass,
        )
        attended, mass = result if return_mass else (result, None)
        return attended.transpose(1, 2).flatten(2), mass


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020); `gate_up` rows: gate, then up."""

    def __init__(self, config: ModelConfig, like: Like) -> None:
        super().__init__()
        self.gate_up = Linear(config.embed_dim, 2 * config.ffn_dim, like)
        self.down = Linear(config.ffn_dim, config.embed_dim, like)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, like: Like) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.embed_dim, config.norm_eps, like)
        self.attention = Attention(config, layer, like)
        self.ffn_norm = RMSNorm(config.embed_dim, config.norm_eps, like)
        self.ffn = FeedForward(config, like)

    def forward(
        self, x: Tensor, positions: Tensor, store: KVStore, rope: RopeSpec, return_mass: bool, fused: bool
    ) -> tuple[Tensor, Tensor | None]:
        if fused:
            qkv = self.attention.qkv.fused(x, norm=self.attention_norm)
            attended, mass = self.attention.attend(qkv, positions, store, rope, return_mass)
            x = self.attention.out.fused(attended, residual=x)
            inner = self.ffn.gate_up.fused(x, norm=self.ffn_norm, swiglu=True)
            return self.ffn.down.fused(inner, residual=x), mass
        attended, mass = self.attention(self.attention_norm(x), positions, store, rope, return_mass)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), mass
