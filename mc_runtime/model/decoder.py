"""A frozen Llama-family decoder.

    x_0 = embedding rows (or gists, or any vectors [B, T, E])
    x   = x + out(attention(norm(x)))         q, k RMS-normed per head in Qwen3
    x   = x + down(silu(gate(norm(x))) * up(norm(x)))
    hidden = norm(x_L);  logits = head(hidden)

Weights ask for no gradient; gradients flow to the inputs and to the keys and values of the context. q, k and v share
one matmul, gate and up another: at T = 1 a step is bound by reading the weights, and fewer, larger reads are faster.
Keys leave a layer unrotated: `context_attention` rotates them while it reads them.

On a CPU without gradients rows go through `fused_linear` (where the library has no vectors, only the few of a decode
step): a weight is read at the rate of memory, and norms, activation and residuals cost no calls of their own. Results
agree within rounding. Where such rows run over a slot cache, one native call does all layers (`native_layers.py`). A
few rows read weights that came quantised as they were (`packing.py`). On a GPU a decode step over a slot cache, and a
chunk of a text that is read, is a CUDA graph (`graphed_layers.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mc_kernels import fused_linear, native
from mc_kernels.checks import FLOAT_DTYPES
from mc_kernels.packed_weight import PackedWeight
from mc_runtime.errors import InputError
from mc_runtime.huge_pages import HugePages
from mc_runtime.model.config import ModelConfig
from mc_runtime.model.graphed_layers import GraphedLayers, graphs
from mc_runtime.model.layers import Layer, Like, RMSNorm
from mc_runtime.model.native_layers import NativeLayers
from mc_runtime.model.stores import KVStore, SelfStore

# Rows up to which `fused_linear` beats torch's matrix products without vectors.
MOST_FUSED_ROWS = 32


def fuses(x: Tensor) -> bool:
    """Whether `fused_linear` is the faster one for x [..., E], where no gradient can be asked for."""
    return (
        x.device.type == "cpu"
        and x.dtype in FLOAT_DTYPES
        and not torch.is_grad_enabled()
        and ((x.numel() <= MOST_FUSED_ROWS * x.shape[-1] and native.available() is None) or native.vectorised())
    )


@dataclass(frozen=True)
class DecoderOutput:
    """hidden: [B, T, E], after the final norm; the raw residual stream when `stop_layer` was given.
    mass: [layers run, B, S], attention probability summed over heads and queries, in the store's slot order; or None.
    tapped: [B, T, E], the residual stream after `hidden_layer` layers; or None.
    logits: [B, vocab], of each row's last entry; or None.
    """

    hidden: Tensor
    mass: Tensor | None = None
    tapped: Tensor | None = None
    logits: Tensor | None = None


class Decoder(nn.Module):
    """See the module. Built with unset weights: `load_model` reads them, `Decoder.random` draws them."""

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__()
        like = Like(dtype, device, HugePages())
        self.config = config
        self.rope = config.rope_spec()
        self.embedding = like.parameter(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(Layer(config, layer, like) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, like)
        self.head = self.embedding if config.tied_embeddings else like.parameter(config.vocab_size, config.embed_dim)
        self.head_packed: PackedWeight | None = None  # from a quantised file
        # Who has put a hook on a part of a layer wants its calls.
        self._hookable = tuple(m for layer in self.layers for m in layer.modules() if m is not layer)
        self._native_layers = NativeLayers()
        self._graphed_layers = GraphedLayers()
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
        logits: bool = False,
    ) -> DecoderOutput:
        """Run entries through the model.

        x: [B, T, E] in the model's dtype. positions: [B, T] int64; an entry at -1 is padding: nothing attends to it
            and it attends to nothing.
        store: what the layers write to and read from; None: the T entries attend to themselves alone.
        stop_layer: run only the first so many layers. hidden_layer: tap the stream after so many layers (0: x itself).
        logits: also of each row's last entry; not with `stop_layer`.
        Raises `InputError` for shapes and layer numbers that do not fit.
        """
        n_layers = self.check_forward(x, positions, stop_layer, hidden_layer, logits=logits)
        output = self._forward(x, positions, store, n_layers, stop_layer, return_mass, hidden_layer, logits)
        if logits and output.logits is None:
            return replace(output, logits=self.logits(output.hidden[:, -1]))
        return output

    def _forward(
        self, x: Tensor, positions: Tensor, store: KVStore | None, n_layers: int, stop_layer: int | None,
        return_mass: bool, hidden_layer: int | None, logits: bool,
    ) -> DecoderOutput:  # fmt: skip
        """With logits where they cost no call of their own."""
        context = SelfStore() if store is None else store
        if n_layers and graphs(x, context):
            norm = self.norm if stop_layer is None else None
            replayed = self._graphed_layers.run(
                self.layers, x, positions, context, self.rope, n_layers, hidden_layer, return_mass, norm
            )
            if replayed is not None:
                return DecoderOutput(*replayed)
        begin = getattr(context, "begin", None)
        if begin is not None:
            begin(positions)
        fused = fuses(x)
        if fused and n_layers:
            norm = self.norm if stop_layer is None else None
            head = (self.head, self._packed_head()) if logits else None
            done = self._native_layers.run(
                self.layers, x, positions, context, self.rope, n_layers, hidden_layer, return_mass, norm, head
            )
            if done is not None:
                return DecoderOutput(*done)
        x, mass, tapped = self._run_layers(x, positions, context, n_layers, hidden_layer, return_mass, fused)
        return DecoderOutput(self.norm(x) if stop_layer is None else x, mass, tapped)

    def _run_layers(
        self, x: Tensor, positions: Tensor, store: KVStore, n_layers: int, hidden_layer: int | None, return_mass: bool,
        fused: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """One after the other: x after the last, their masses, x after `hidden_layer` of them."""
        masses: list[Tensor] = []
        tapped = x if hidden_layer == 0 else None
        fused = fused and not any(m._forward_hooks or m._forward_pre_hooks for m in self._hookable)
        for number, layer in zip(range(1, n_layers + 1), self.layers, strict=False):
            x, mass = layer(x, positions, store, self.rope, return_mass, fused)
            if mass is not None:
                masses.append(mass)
            if number == hidden_layer:
                tapped = x
        return x, torch.stack(masses) if masses else None, tapped

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., E] -> [..., vocab] in the model's dtype."""
        if not fuses(hidden):
            return F.linear(hidden, self.head)
        return fused_linear(hidden, self.head, packed=self._packed_head())

    def _packed_head(self) -> Tensor | None:
        return None if self.head_packed is None else self.head_packed.of(self.head)

    def check_forward(
        self, x: Tensor, positions: Tensor, stop_layer: int | None, hidden_layer: int | None, *, logits: bool = False
    ) -> int:
        """Raise what `forward` raises for its arguments; returns how many layers are run."""
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
        if logits and (stop_layer is not None or x.shape[1] == 0):
            raise InputError("logits: expected all layers and at least one entry a row")
        return n_layers
