"""flash-linear-attention: its Triton rotary, norm, SwiGLU and softmax-attention kernels.

`context_attention` only for one query: its attention over several queries wants as many queries as keys.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mc_kernels.gist_encode.weights import GistEncodeWeights
from mc_kernels.rope import phases

from ..workloads import Candidate, Workload
from .liger import EPS, encode_with, kernel, local_phases, splice_with, splices_rotated

NAME = "fla"
ROTARY, DECODING = "fla.modules.rotary", "fla.ops.attn.decoding"


def missing(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "needs a CUDA device"
    return None if find_spec("fla") else "package flash-linear-attention is not installed"


def _turn(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = table
    return kernel(ROTARY, "rotary_embedding")(x, cos, sin, inplace=True)


def _splice(workload: Workload) -> Candidate:
    # Its kernel wants phases in the dtype of what it rotates.
    return splice_with(workload, NAME, lambda cos, sin: (cos.to(workload.dtype), sin.to(workload.dtype)), _turn)


def _encode(state: Any) -> Tensor:
    rms_norm, swiglu = kernel("fla.modules.norm.layernorm", "rms_norm"), kernel("fla.modules.activations", "swiglu")
    rotary_embedding = kernel(ROTARY, "rotary_embedding")

    def turn(q: Tensor, k: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rotary_embedding(q, *table), rotary_embedding(k, *table)

    return encode_with(
        state,
        norm=lambda x, weight: rms_norm(x, weight, None, eps=EPS),
        gated=lambda y: swiglu(*y.chunk(2, dim=-1)),
        turn=turn,
    )


def _prepare_encode(inputs: tuple[Tensor, GistEncodeWeights]) -> tuple[Tensor, GistEncodeWeights, Any]:
    blocks, weights = inputs
    cos, sin = local_phases(weights, blocks.shape[1])
    return blocks, weights, (cos.to(blocks.dtype), sin.to(blocks.dtype))


def _prepare_decode(inputs: dict[str, Any]) -> tuple[Any, ...]:
    """Everything as [1, S, H, D]; phases per slot, so that the order of the slots does not matter."""
    q, k, v = (inputs[x].transpose(1, 2).contiguous() for x in ("q", "k", "v"))
    inv_freq = inputs["rope"].inv_freq_on(q.device)
    at = [tuple(x.to(q.dtype) for x in phases(inputs[name][0], inv_freq)) for name in ("q_pos", "kv_pos")]
    return q, k, v, *at, torch.tensor([0, k.shape[1]], device=q.device)


def _decode(state: tuple[Any, ...]) -> Tensor:
    rotary_embedding, decode = kernel(ROTARY, "rotary_embedding"), kernel(DECODING, "attn_decoding_one_step")
    q, k, v, q_phases, k_phases, lengths = state
    return decode(rotary_embedding(q, *q_phases), rotary_embedding(k, *k_phases), v, cu_seqlens=lengths)


def offers(workload: Workload) -> list[Candidate]:
    case = workload.case
    if splices_rotated(workload):
        return [_splice(workload)]
    if workload.op == "gist_encode":
        note = "its norm, SwiGLU and rotary; torch's products and attention"
        return [Candidate(NAME, _encode, _prepare_encode, note=note)]
    if workload.op == "context_attention" and case.queries == 1 and case.batch == 1 and not case.features:
        note = "rotates all keys first, then its one-step decode"
        return [Candidate(NAME, _decode, _prepare_decode, lambda _, out: out.transpose(1, 2), note)]
    return []
