"""What GistNet could read of a block beside its tokens' embeddings: for ablations, no memory feeds it so.

`hidden:N`      the residual stream after the model's first N layers, which has seen what stands before the block. Each
                channel is taken at mean 0 and variance 1 over training text: a few channels are a hundred times as wide
                as the others and the same for all tokens, and would be all that a block's mean says.
left context    the tokens of the block before as further keys and values of each layer (Transformer-XL, Dai et al.
                2019), at the positions -K to -1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels import GistEncodeWeights
from mc_kernels.gist_encode.ref import unit_rms
from mc_kernels.rope import phases, rotate
from mc_runtime.errors import InputError
from mc_runtime.model.decoder import Decoder

from .corpus import Corpus, sample_mixture

EMBEDDINGS = "embeddings"


@dataclass(frozen=True, eq=False)
class BlockInputs:
    """layers: of the model that run first; 0: none. mean, scale: [E] fp32, of what they give."""

    layers: int = 0
    mean: Tensor | None = None
    scale: Tensor | None = None

    @classmethod
    def parse(cls, text: str) -> int:
        """Layers that `embeddings` or `hidden:N` ask for. Raises InputError."""
        if text == EMBEDDINGS:
            return 0
        name, _, number = text.partition(":")
        if name != "hidden" or not number.isdigit() or int(number) < 1:
            raise InputError(f"inputs: expected {EMBEDDINGS} or hidden:N with N layers, got {text!r}")
        return int(number)

    @classmethod
    @torch.no_grad()
    def measured(
        cls,
        decoder: Decoder,
        corpora: Sequence[Corpus],
        layers: int,
        *,
        seed: int = 0,
        texts: int = 32,
        length: int = 256,
    ) -> BlockInputs:
        """Mean and spread over texts drawn with `seed`. Raises InputError if the model has too few layers."""
        if layers == 0:
            return cls()
        if layers > decoder.config.n_layers:
            raise InputError(f"inputs: expected at most {decoder.config.n_layers} layers, got {layers}")
        ids = torch.from_numpy(sample_mixture(corpora, random.Random(f"inputs {seed}"), texts, length))
        parts = [cls(layers).rows(decoder, some.to(decoder.device)) for some in ids.split(8)]
        # The first token is the sink: its stream is like no other's.
        rows = torch.cat(parts)[:, 1:].flatten(0, 1).float()
        return cls(layers, rows.mean(0), rows.std(0).clamp_min(1e-6))

    @torch.no_grad()
    def rows(self, decoder: Decoder, ids: Tensor) -> Tensor:
        """ids [B, N] -> [B, N, E] in the model's dtype."""
        x = decoder.embed(ids)
        if self.layers == 0:
            return x
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        hidden = decoder(x, positions, stop_layer=self.layers).hidden
        return hidden if self.mean is None else ((hidden.float() - self.mean) / self.scale).to(x)


def encode_with_left_context(blocks: Tensor, weights: GistEncodeWeights) -> Tensor:
    """`gist_encode` of level 1 in which a block also attends to the one before it. blocks [B, M, K, E], the M of a text
    in order -> [B, M, E] in blocks' dtype; computed in fp32, differentiable. pool: `softmax` or `mean`."""
    w, x = weights, blocks.float()
    b, m, size, _ = x.shape
    heads, width = w.n_heads, w.width
    dim = width // heads
    inv_freq = w.rope_theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    cos, sin = phases(torch.arange(2 * size, device=x.device), inv_freq, x.dtype)
    before, own = slice(0, size), slice(size, 2 * size)
    # Nothing stands before a text's first block.
    mask = torch.zeros(m, 1, 1, 2 * size, device=x.device)
    mask[0, ..., before] = -torch.inf
    h = unit_rms(x) @ w.w_in.T + w.level_emb[0]
    for i in range(w.qkv.shape[0]):
        qkv = (unit_rms(h) * w.attn_norm[i]) @ w.qkv[i].T
        q, k, v = qkv.view(b, m, size, 3, heads, dim).permute(3, 0, 1, 4, 2, 5)  # [B, M, heads, K, d]
        q = rotate(q, cos[own], sin[own], False)
        keys = torch.cat(
            (rotate(_shifted(k), cos[before], sin[before], False), rotate(k, cos[own], sin[own], False)), 3
        )
        p = torch.softmax(q @ keys.transpose(-1, -2) * dim**-0.5 + mask, dim=-1)
        mixed = p @ torch.cat((_shifted(v), v), 3)
        h = h + mixed.transpose(2, 3).reshape(b, m, size, width) @ w.attn_out[i].T
        gate, up = ((unit_rms(h) * w.ffn_norm[i]) @ w.gate_up[i].T).chunk(2, dim=-1)
        h = h + (F.silu(gate) * up) @ w.down[i].T
    s = unit_rms(h) * w.final_norm
    if w.pool == "softmax":
        pooled = (torch.softmax((w.pool_q @ s.transpose(-1, -2)) * width**-0.5, dim=-1) @ s)[:, :, 0]
    else:
        pooled = s.mean(2)
    z = unit_rms(x.mean(2) - w.mu) * w.target_rms + pooled @ w.w_out.T
    return (unit_rms(z) * (w.gain * w.target_rms)).to(blocks.dtype)


def _shifted(x: Tensor) -> Tensor:
    """Each block's neighbour on the left, [B, M, ...]; zeros for the first."""
    return torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
