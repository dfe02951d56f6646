"""What `gist_encode`'s Triton host code passes around: the net's weights and constants, and its buffers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Net(NamedTuple):
    """The 13 weights in the order of the op's schema, the last dimension contiguous, and the constants."""

    mu: Tensor
    w_in: Tensor
    level_emb: Tensor
    attn_norm: Tensor
    qkv: Tensor
    attn_out: Tensor
    ffn_norm: Tensor
    gate_up: Tensor
    down: Tensor
    final_norm: Tensor
    pool_q: Tensor
    w_out: Tensor
    gain: Tensor
    level: int
    n_heads: int
    pool: str
    rope_theta: float
    target_rms: float

    @classmethod
    def of(cls, args: Iterable[Any]) -> Net:
        given = tuple(args)
        weights = (x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous() for x in given[:13])
        return cls(*weights, *given[13:])

    def weights(self) -> tuple[Tensor, ...]:
        return self[:13]

    @property
    def width(self) -> int:
        return self.w_in.shape[0]

    @property
    def ffn(self) -> int:
        return self.down.shape[2]

    @property
    def gists(self) -> int:
        return self.pool_q.shape[0]

    @property
    def layers(self) -> int:
        return self.qkv.shape[0]

    def rows(self, block_size: int) -> int:
        """Of a window in the residual stream."""
        return block_size + (self.pool == "cls")


def compute_dtype(blocks: Tensor, net: Net) -> torch.dtype:
    return blocks.dtype if blocks.dtype == net.w_in.dtype else torch.float32


@dataclass(frozen=True)
class BulkBuffers:
    """Weights times the gain of the norm before them, [layers, 3 Eg, Eg] and [layers, 2 F, Eg] (`triton_bulk`), and the
    squares of the rows of the residual stream, in parts."""

    qkv: Tensor
    gate_up: Tensor
    squares: Tensor


@dataclass(frozen=True)
class Buffers:
    """What the kernels write on the way. `h`: the residual stream before the first layer and after each half of one
    (2 * layers + 1); `attention`: each layer's. Entries may be one and the same memory where nothing is kept.
    bulk: what only a plan with bulk kernels needs."""

    h: list[Tensor]
    attention: list[Tensor]
    swiglu: Tensor
    pooled: Tensor
    y: Tensor
    centred: Tensor
    phases: Tensor
    bulk: BulkBuffers | None = None
