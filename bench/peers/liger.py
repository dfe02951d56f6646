"""Liger-Kernel: Triton rope, RMS norm and SwiGLU, for `kv_splice_` with rotation and for `gist_encode`.

A library of single kernels has no splice and no GistNet. `GatheredSplice` and `encode_with` compose these from such
kernels as its users would; the peers of other kernel libraries use them too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mc_kernels.gist_encode.weights import GistEncodeWeights
from mc_kernels.rope import phases

from ..workloads import Candidate, Workload

NAME = "liger"
OPS = "liger_kernel.ops"
EPS = 1e-12


def missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if find_spec("liger_kernel") else "package liger-kernel is not installed"


@cache
def kernel(module: str, name: str) -> Any:
    """`name` of a rival's module, looked up once: an import costs a microsecond on every timed call."""
    return getattr(import_module(module), name)


class GatheredSplice:
    """An ordered splice of rotated keys around a rotation kernel: gather what moves, rotate it, scatter it.

    table: cos, sin [n, D/2] fp32 -> phases as the kernel takes them; untimed.
    turn: contiguous x [R, n, H, D], phases -> x rotated, in place or not.
    """

    def __init__(
        self, inputs: dict[str, Any], table: Callable[[Tensor, Tensor], Any], turn: Callable[[Tensor, Any], Tensor]
    ) -> None:
        plan, inv_freq = inputs["plan"], inputs["rope"].inv_freq_on(inputs["k"].device)
        device = inv_freq.device
        # [R, S, H, D]: a gather then gives the layout that the kernels want. B = 1: the views stay views.
        self.k, self.v = (inputs[x].squeeze(1).transpose(1, 2) for x in ("k", "v"))
        self.k_new, self.v_new = (inputs[x].transpose(1, 2) for x in ("k_new", "v_new"))
        self.source, self.target = (x.contiguous() for x in plan.moves.to(device).unbind(1))
        self.slots = plan.insert_slots.to(device)
        self.moved = table(*phases(self.target - self.source, inv_freq))
        self.new = table(*phases(self.slots, inv_freq))
        self.turn = turn

    def __call__(self) -> None:
        moved = self.turn(self.k.index_select(1, self.source), self.moved)
        self.k.index_copy_(1, self.target, moved)
        self.v.index_copy_(1, self.target, self.v.index_select(1, self.source))
        # A copy: `turn` may work in place, and the inputs are used again.
        new = self.turn(self.k_new.clone(memory_format=torch.contiguous_format), self.new)
        self.k.index_copy_(1, self.slots, new)
        self.v.index_copy_(1, self.slots, self.v_new)


def splice_with(
    workload: Workload,
    name: str,
    table: Callable[[Tensor, Tensor], Any],
    turn: Callable[[Tensor, Any], Tensor],
) -> Candidate:
    """The candidate of a `GatheredSplice`. workload: `kv_splice_`, B = 1, packed rotated keys."""

    def result(state: GatheredSplice, _: Any) -> Any:
        return workload.by_slot(state.k.transpose(1, 2), state.v.transpose(1, 2))  # type: ignore[attr-defined]

    return Candidate(
        name, lambda state: state(), lambda inputs: GatheredSplice(inputs, table, turn), result,
        "gather, its rotation kernel, scatter",
    )  # fmt: skip


def splices_rotated(workload: Workload) -> bool:
    """Whether there is anything to rotate, in the one layout that `GatheredSplice` takes."""
    case = workload.case
    return workload.op == "kv_splice_" and bool(case.rope) and case.discipline == "ordered" and case.batch == 1


def encode_with(
    state: tuple[Tensor, GistEncodeWeights, Any],
    norm: Callable[[Tensor, Tensor | None], Tensor],
    gated: Callable[[Tensor], Tensor],
    turn: Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]],
) -> Tensor:
    """GistNet (`softmax` pooling, level 1) with a library's norm(x, weight), silu(gate) * up of [..., 2F], and
    turn(q, k, phases) of [N, K, heads, d]; products and attention are torch's. state: blocks, weights, phases."""
    blocks, w, local = state
    (n, k, _), width, heads = blocks.shape, w.width, w.n_heads
    h = F.linear(norm(blocks, None), w.w_in) + w.level_emb[0]
    for i in range(w.qkv.shape[0]):
        q, key, v = F.linear(norm(h, w.attn_norm[i]), w.qkv[i]).view(n, k, 3, heads, width // heads).unbind(2)
        q, key = turn(q, key, local)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), key.transpose(1, 2), v.transpose(1, 2))
        h = h + F.linear(attended.transpose(1, 2).reshape(n, k, width), w.attn_out[i])
        h = h + F.linear(gated(F.linear(norm(h, w.ffn_norm[i]), w.gate_up[i])), w.down[i])
    s = norm(h, w.final_norm)
    p = torch.softmax(w.pool_q @ s.transpose(-1, -2) * width**-0.5, dim=-1)
    base = norm(blocks.mean(1, keepdim=True) - w.mu, None) * w.target_rms
    return norm(base + F.linear(p @ s, w.w_out), None) * (w.gain * w.target_rms)


def local_phases(weights: GistEncodeWeights, block_size: int) -> tuple[Tensor, Tensor]:
    """cos, sin [K, d/2] fp32 of the positions inside a window."""
    d, device = weights.width // weights.n_heads, weights.w_in.device
    inv_freq = weights.rope_theta ** (-torch.arange(0, d, 2, dtype=torch.float64, device=device) / d)
    return phases(torch.arange(block_size, device=device), inv_freq)


def _table(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """[1, n, D], both halves alike, as Hugging Face models hold them."""
    return torch.cat((cos, cos), dim=-1)[None], torch.cat((sin, sin), dim=-1)[None]


def _turn(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """The kernel rotates queries and keys: here one half of the rows each. In place, x being contiguous."""
    q, k = (half.transpose(1, 2) for half in x.chunk(2))
    kernel(OPS, "LigerRopeFunction").apply(q, k, *table)
    return x


def _encode(state: Any) -> Tensor:
    rope, norm = kernel(OPS, "LigerRopeFunction").apply, kernel(OPS, "LigerRMSNormFunction").apply

    def turn(q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *table)
        return q.transpose(1, 2), k.transpose(1, 2)

    return encode_with(
        state,
        norm=lambda x, weight: norm(x, weight, EPS),
        gated=kernel(OPS, "LigerFusedGateUpSiLUMulFunction").apply,
        turn=turn,
    )


def offers(workload: Workload) -> list[Candidate]:
    if splices_rotated(workload) and workload.case.rows % 2 == 0:
        return [splice_with(workload, NAME, _table, _turn)]
    if workload.op == "gist_encode":

        def prepare(inputs: tuple[Tensor, GistEncodeWeights]) -> tuple[Tensor, GistEncodeWeights, Any]:
            blocks, weights = inputs
            cos, sin = (x.to(blocks.dtype) for x in local_phases(weights, blocks.shape[1]))
            return blocks, weights, _table(cos, sin)

        return [Candidate(NAME, _encode, prepare, note="its norm, SwiGLU and rope; torch's products and attention")]
    return []
