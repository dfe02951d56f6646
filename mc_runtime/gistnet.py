"""GistNet: the weights that turn 32 tokens, or 32 gists, into one gist.

Three parts, each per kind of gist: `encode` (summary vectors in embedding space), `pool` (keys and values of a block to
those of one entry) and `project` (keys and values of all layers from a summary vector). Untrained, `encode` is the
centred mean of the block's embeddings, `pool` the mean of its keys and values, and `project` reads the summary through
each layer's own key and value weights. Files are safetensors, in fp32 or bf16; weights keep the dtype of their file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mc_kernels import GistEncodeWeights, GistPoolWeights, gist_encode, gist_pool

from .errors import ModelError
from .model.decoder import Decoder
from .model.layers import Layer

# An untrained net's output projection is zero: its width does not matter.
UNTRAINED_WIDTH = 64


@dataclass(frozen=True)
class Projector:
    """Low-rank map from a summary vector to keys and values: up @ (down @ s) + bias.

    down [r, E]; up [L, 2, Hkv, D, r]; bias [L, 2, Hkv, D].
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def __call__(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """summary [M, E] -> k, v [L, Hkv, M, D], keys unrotated, in fp32."""
        code = summary.float() @ self.down.float().T
        kv = torch.einsum("mr,lchdr->lchmd", code, self.up.float()) + self.bias.float().unsqueeze(3)
        return kv[:, 0], kv[:, 1]


class LayerProjector:
    """What each layer's own weights make of the summary, as if it were the stream that the layer reads. Exact for a
    first layer; a start for training elsewhere."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def __call__(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """summary [M, E] -> k, v [L, Hkv, M, D]."""
        c = self.decoder.config
        keys, values = [], []
        for module in self.decoder.layers:
            layer = cast(Layer, module)
            qkv = layer.attention.qkv(layer.attention_norm(summary)).view(len(summary), -1, c.head_dim)
            k, v = qkv[:, c.n_heads : c.n_heads + c.n_kv_heads], qkv[:, c.n_heads + c.n_kv_heads :]
            keys.append((k if layer.attention.k_norm is None else layer.attention.k_norm(k)).transpose(0, 1))
            values.append(v.transpose(0, 1))
        return torch.stack(keys), torch.stack(values)


def row_statistics(rows: Tensor) -> tuple[Tensor, float]:
    """Mean [E], in fp32, and root mean square of rows [N, E]: a stretch of them at a time, since a copy in fp32 of all
    of a vocabulary's embeddings takes longer than all else that opening a memory does."""
    total, squares = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device), 0.0
    for part in rows.split(1 << 12):
        values = part.float()
        total += values.sum(0)
        squares += float(torch.linalg.vector_norm(values, dim=1).double().square().sum())
    return (total / len(rows)).float(), (squares / rows.numel()) ** 0.5


@dataclass(frozen=True)
class GistNet:
    """Weights of all three parts. `pool_weights[i]` serves level i + 1; levels above are means.

    gist_bias: what a memory weighs these gists by in attention, as a logarithm, where its settings do not say (see
    `MemoryConfig`).
    """

    encode_weights: GistEncodeWeights
    pool_weights: tuple[GistPoolWeights, ...]
    projector: Projector | LayerProjector
    fingerprint: str
    gist_bias: float = 0.0

    @classmethod
    def untrained(cls, decoder: Decoder, block_size: int) -> GistNet:
        """The baselines by construction, without any transformer layer to run for nothing."""
        c = decoder.config
        mean, rms = row_statistics(decoder.embedding)
        encode = GistEncodeWeights.init(
            c.embed_dim,
            UNTRAINED_WIDTH,
            layers=0,
            n_heads=1,
            ffn_dim=UNTRAINED_WIDTH,
            max_block_size=block_size,
            mu=mean,
            target_rms=rms,
            generator=torch.Generator().manual_seed(0),
            device=decoder.device,
        )
        pool = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, block_size, c.head_dim).to(decoder.device)
        return cls(encode, (pool,), LayerProjector(decoder), f"untrained-{block_size}")

    @classmethod
    def load(cls, path: Path | str, decoder: Decoder, block_size: int) -> GistNet:
        """Read a safetensors file written by `save`; parts that it lacks stay untrained.

        Raises ModelError if it cannot be read or does not fit the model.
        """
        base = cls.untrained(decoder, block_size)
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        try:
            encode, pool, projector = base.encode_weights, base.pool_weights, base.projector
            if "encode" in parts:
                encode = GistEncodeWeights.from_state_dict(tensors, metadata, "encode/").to(decoder.device)
            levels = sorted(int(p.removeprefix("pool")) for p in parts if p.startswith("pool"))
            if levels:
                if levels != list(range(1, len(levels) + 1)):
                    raise ValueError(f"pool: expected levels 1 to n, got {levels}")
                weights = (GistPoolWeights.from_state_dict(tensors, f"pool{level}/") for level in levels)
                pool = tuple(w.to(decoder.device) for w in weights)
            if "project" in parts:
                projector = Projector(**{k: v.to(decoder.device) for k, v in parts["project"].items()})
            net = cls(encode, pool, projector, _digest(tensors), float(metadata.get("gist_bias", 0.0)))
            if not math.isfinite(net.gist_bias):
                raise ValueError(f"gist_bias: expected a finite number, got {net.gist_bias}")
            net._check_fits(decoder, block_size)
            bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
            if bad:
                raise ValueError(f"{bad[0]} holds values that are not finite")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for shapes
            reason = " ".join(str(error).split())
            raise ModelError(f"{path}: not GistNet weights for this model: {reason}") from error
        return net

    def save(self, path: Path | str, *, dtype: torch.dtype | None = None) -> None:
        """Write all trained parts (an untrained projector belongs to the model and is not written).

        dtype: of the file; bf16 halves it. None: as the weights are.
        """
        tensors = self.encode_weights.state_dict("encode/")
        for level, weights in enumerate(self.pool_weights, start=1):
            tensors |= weights.state_dict(f"pool{level}/")
        if isinstance(self.projector, Projector):
            p = self.projector
            tensors |= {"project/down": p.down, "project/up": p.up, "project/bias": p.bias}
        written = {name: x.detach().to("cpu", dtype).contiguous().clone() for name, x in tensors.items()}
        save_file(written, str(path), self.encode_weights.metadata("encode/") | {"gist_bias": repr(self.gist_bias)})

    def _check_fits(self, decoder: Decoder, block_size: int) -> None:
        c = decoder.config
        probe = torch.zeros(1, block_size, c.embed_dim, device=decoder.device)
        if self.encode(probe).shape != (1, c.embed_dim):
            raise ValueError("encode: expected one gist per block")
        entries = torch.zeros(c.n_layers, c.n_kv_heads, 1, block_size, c.head_dim, device=decoder.device)
        below = 1
        for level, weights in enumerate(self.pool_weights, start=1):
            if weights.layers != c.n_layers:
                raise ValueError(f"pool{level}: expected {c.n_layers} layers, got {weights.layers}")
            if weights.block_size != block_size * below:
                raise ValueError(f"pool{level}: expected {block_size * below} children, got {weights.block_size}")
            children = entries.repeat(1, 1, 1, below, 1)
            gist_pool(children, children, weights)
            below = weights.n_gists
        k, _ = self.project(probe[0, :1].to(decoder.dtype))
        if k.shape != (c.n_layers, c.n_kv_heads, 1, c.head_dim):
            raise ValueError(f"project: expected keys for {c.n_layers} layers, got shape {list(k.shape)}")

    def encode(self, blocks: Tensor, *, level: int = 1) -> Tensor:
        """blocks [N, K, E] (token embeddings, or gists of the level below) -> summary vectors [N, E]."""
        return gist_encode(blocks, self.encode_weights, level=level)[:, 0]

    def weights_of(self, level: int) -> GistPoolWeights:
        """Those that pool into a level. Levels above the trained ones are means: their input is distributed unlike the
        one that any weights here were trained on."""
        if level <= len(self.pool_weights):
            return self.pool_weights[level - 1]
        return GistPoolWeights(*(torch.zeros_like(x) for x in self.pool_weights[-1].tensors()))

    def pool(self, k: Tensor, v: Tensor, *, level: int = 1) -> tuple[Tensor, Tensor]:
        """k, v [L, Hkv, N, K, D], keys unrotated -> [L, Hkv, N, D] each. Raises ModelError for weights of several gists
        per block: a node of the tree holds one."""
        weights = self.weights_of(level)
        if weights.n_gists != 1:
            raise ModelError(f"GistNet: expected one gist per block, got weights of {weights.n_gists}")
        k_gist, v_gist = gist_pool(k, v, weights)
        return k_gist[..., 0, :], v_gist[..., 0, :]

    def project(self, summary: Tensor) -> tuple[Tensor, Tensor]:
        """summary [M, E] -> k, v [L, Hkv, M, D], keys unrotated."""
        return self.projector(summary)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        x = tensors[name].contiguous()
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.view(torch.uint8).numpy().tobytes() if x.numel() else b"")
    return digest.hexdigest()[:16]
