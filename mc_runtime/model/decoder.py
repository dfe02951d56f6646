"""A frozen Llama-family decoder.

    x_0 = embedding rows (or gists, or any vectors [B, T, E])
    x   = x + out(attention(norm(x)))         q, k RMS-normed per head in Qwen3
    x   = x + down(silu(gate(norm(x))) * up(norm(x)))
    hidden = norm(x_L);  logits = head(hidden)

Weights ask for no gradient; gradients flow to the inputs and to the keys and values of the context. q, k and v share
one matmul, gate and up another: at T = 1 a step is bound by reading the weights, and fewer, larger reads are faster.
Keys leave a layer unrotated: `context_attention` rotates them while it reads them.

A few rows on a CPU without gradients, which is what a decode step is, go through `fused_linear`: a weight is read at
the rate of memory, and norms, activation and residuals cost no calls of their own. Results agree within rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_kernels import RopeSpec, context_attention, fused_linear, native
from mc_kernels.checks import FLOAT_DTYPES
from mc_runtime.errors import InputError
from mc_runtime.model.config import ModelConfig
from mc_runtime.model.stores import KVStore, SelfStore

# Rows up to which `fused_linear` beats torch's matrix products, by measurement.
MOST_FUSED_ROWS = 8


@dataclass(frozen=True)
class DecoderOutput:
    """hidden: [B, T, E], after the final norm; the raw residual stream when `stop_layer` was given.
    mass: [layers run, B, S], attention probability summed over heads and queries, in the store's slot order; or None.
    tapped: [B, T, E], the residual stream after `hidden_layer` layers; or None.
    """

    hidden: Tensor
    mass: Tensor | None = None
    tapped: Tensor | None = None


class Like(NamedTuple):
    """Where and in which precision parameters live."""

    dtype: torch.dtype
    device: torch.device | None

    def parameter(self, *shape: int) -> nn.Parameter:
        """Frozen and not set yet."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)


class Linear(nn.Module):
    """x W^T + b, without the time that `nn.Linear` takes to draw weights that are then read from a file."""

    def __init__(self, inputs: int, outputs: int, like: Like, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = like.parameter(outputs, inputs)
        self.bias = like.parameter(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def fused(
        self, x: Tensor, *, norm: RMSNorm | None = None, swiglu: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """With what a layer does before and after it, see `mc_kernels.fused_linear`."""
        gain, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return fused_linear(x, self.weight, norm=gain, eps=eps, bias=self.bias, swiglu=swiglu, residual=residual)


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


class Decoder(nn.Module):
    """See the module. Built with unset weights: `load_model` reads them, `Decoder.random` draws them."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__()
        like = Like(dtype, device)
        self.config = config
        self.rope = config.rope_spec()
        self.embedding = like.parameter(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(Layer(config, layer, like) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, like)
        self.head = self.embedding if config.tied_embeddings else like.parameter(config.vocab_size, config.embed_dim)
        # Who has put a hook on a part of a layer wants its calls.
        self._hookable = tuple(m for layer in self.layers for m in layer.modules() if m is not layer)
        self.eval()

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        std: float = 0.02,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Decoder:
        """Weights drawn from N(0, std**2), norms at 1: for tests and for timing shapes that nobody has at hand."""
        decoder = cls(config, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in decoder.named_parameters():
            is_norm = name.endswith("norm.weight")
            parameter.copy_(torch.ones(()) if is_norm else torch.randn(parameter.shape, generator=generator) * std)
        return decoder

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> [B, T, E] in the model's dtype."""
        return F.embedding(ids, self.embedding)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        store: KVStore | None = None,
        *,
        stop_layer: int | None = None,
        return_mass: bool = False,
        hidden_layer: int | None = None,
    ) -> DecoderOutput:
        """Run entries through the model.

        x: [B, T, E] in the model's dtype. positions: [B, T] int64; an entry at -1 is padding: nothing attends to it
            and it attends to nothing.
        store: what the layers write to and read from; None: the T entries attend to themselves alone.
        stop_layer: run only the first so many layers. hidden_layer: tap the stream after so many layers (0: x itself).
        Raises `InputError` for shapes and layer numbers that do not fit.
        """
        n_layers = self._check(x, positions, stop_layer, hidden_layer)
        context = SelfStore() if store is None else store
        begin = getattr(context, "begin", None)
        if begin is not None:
            begin(positions)
        masses: list[Tensor] = []
        tapped = x if hidden_layer == 0 else None
        fused = self._fuses(x) and not any(m._forward_hooks or m._forward_pre_hooks for m in self._hookable)
        for number, layer in zip(range(1, n_layers + 1), self.layers, strict=False):
            x, mass = layer(x, positions, context, self.rope, return_mass, fused)
            if mass is not None:
                masses.append(mass)
            if number == hidden_layer:
                tapped = x
        hidden = self.norm(x) if stop_layer is None else x
        return DecoderOutput(hidden, torch.stack(masses) if masses else None, tapped)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] -> [..., vocab] in the model's dtype."""
        return fused_linear(hidden, self.head) if self._fuses(hidden) else F.linear(hidden, self.head)

    def _fuses(self, x: Tensor) -> bool:
        """Whether x [..., E] is few enough rows, where no gradient can be asked for."""
        return (
            x.device.type == "cpu"
            and x.dtype in FLOAT_DTYPES
            and x.numel() <= MOST_FUSED_ROWS * x.shape[-1]
            and not torch.is_grad_enabled()
            and native.available() is None
        )

    def _check(self, x: Tensor, positions: Tensor, stop_layer: int | None, hidden_layer: int | None) -> int:
        if x.dim() != 3 or x.shape[-1] != self.config.embed_dim or x.dtype != self.dtype:
            raise InputError(
                f"x: expected [B, T, {self.config.embed_dim}] {self.dtype}, got {tuple(x.shape)} {x.dtype}"
            )
        if positions.shape != x.shape[:2] or positions.dtype != torch.int64:
            expected = f"[{x.shape[0]}, {x.shape[1]}] torch.int64"
            raise InputError(f"positions: expected {expected}, got {tuple(positions.shape)} {positions.dtype}")
        n_layers = self.config.n_layers if stop_layer is None else stop_layer
        if not 0 <= n_layers <= self.config.n_layers:
            raise InputError(f"stop_layer: expected 0 to {self.config.n_layers}, got {stop_layer}")
        if hidden_layer is not None and not 0 <= hidden_layer <= n_layers:
            raise InputError(f"hidden_layer: expected 0 to {n_layers}, got {hidden_layer}")
        return n_layers
