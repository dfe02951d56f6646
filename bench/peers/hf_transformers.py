"""Hugging Face transformers: what its users write where a cache is edited, and its own attention functions.

transformers has no edit in the middle of a cache: the tensors of every layer of a `DynamicCache` are put together anew,
the keys that change their place re-rotated by the difference as the former `SinkCache` did it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mc_kernels.rope import RopeSpec, phases

from ..workloads import Candidate, Workload
from ..workloads.context_attention import visible
from ..workloads.kv_splice import KvSplice

NAME = "transformers"
Phases = tuple[Tensor, Tensor]


def missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("transformers") else "package transformers is not installed"


def offers(workload: Workload) -> list[Candidate]:
    if isinstance(workload, KvSplice) and workload.case.discipline == "ordered":
        return [splicing(workload)]
    if workload.op == "context_attention" and not workload.case.features:
        return [attention()]
    return []


def _phases(positions: Tensor, rope: RopeSpec, like: Tensor) -> Phases:
    """cos and sin [..., n, D] in the storage dtype, as `LlamaRotaryEmbedding` returns them: made once a forward."""
    angles = phases(positions.to(like.device), rope.inv_freq_on(like.device))
    cos, sin = (torch.cat((x, x), dim=-1).to(like.dtype) for x in angles)
    return cos, sin


@dataclass(frozen=True)
class Piece:
    """A stretch of entries after the splice: of the old ones or, if fresh, of the new ones. turn: of moved keys."""

    entries: slice
    fresh: bool = False
    turn: Phases | None = None


def pieces(plan: Any, rope: RopeSpec | None, like: Tensor) -> list[Piece]:
    """The entries after an ordered splice from left to right."""
    found: list[tuple[int, Piece]] = []
    for source, destination, count in plan.segments.tolist() + plan.stays.tolist():
        shift = destination - source
        turn = _phases(torch.tensor([shift]), rope, like) if rope is not None and shift else None
        found.append((destination, Piece(slice(source, source + count), turn=turn)))
    first = 0
    for _, _, insert in plan.edits.tolist():
        if insert:
            found.append((int(plan.insert_slots[first]), Piece(slice(first, first + insert), fresh=True)))
        first += insert
    return [piece for _, piece in sorted(found, key=lambda item: item[0])]


def rotation() -> Callable[[Tensor, Phases | None], Tensor]:
    """The formula of `apply_rotary_pos_emb`, which itself turns two tensors, q and k, by the same phases."""
    from transformers.models.llama.modeling_llama import rotate_half

    def rotated(x: Tensor, turn: Phases | None) -> Tensor:
        return x if turn is None else (x * turn[0]) + (rotate_half(x) * turn[1])

    return rotated


def splicing(workload: KvSplice) -> Candidate:
    from transformers import DynamicCache

    rotated = rotation()

    def prepare(inputs: dict[str, Any]) -> SimpleNamespace:
        k, v, plan, rope = (inputs[name] for name in ("k", "v", "plan", "rope"))
        new = [inputs[name].unflatten(0, k.shape[:2]) for name in ("k_new", "v_new")]
        before = [(x[..., : plan.length, :], y[..., : plan.length, :]) for x, y in zip(k, v, strict=True)]
        # Tensors are replaced, so the result is another cache than that before: every call has to start from the same.
        after = DynamicCache([(x[..., :0, :], y[..., :0, :]) for x, y in before])
        return SimpleNamespace(
            before=before, after=after, new=list(zip(*new, strict=True)), pieces=pieces(plan, rope, k),
            new_turn=None if rope is None else _phases(plan.insert_slots, rope, k),
        )  # fmt: skip

    def run(state: SimpleNamespace) -> Any:
        for layer, (k, v), (k_new, v_new) in zip(state.after.layers, state.before, state.new, strict=True):
            k_new = rotated(k_new, state.new_turn)
            keys, values = [], []
            for piece in state.pieces:
                k_from, v_from = (k_new, v_new) if piece.fresh else (k, v)
                keys.append(rotated(k_from[..., piece.entries, :], piece.turn))
                values.append(v_from[..., piece.entries, :])
            layer.keys, layer.values = torch.cat(keys, dim=-2), torch.cat(values, dim=-2)
        return state.after

    def result(_: SimpleNamespace, cache: Any) -> tuple[Tensor, Tensor]:
        return workload.by_slot(
            torch.stack([layer.keys for layer in cache.layers]), torch.stack([layer.values for layer in cache.layers])
        )

    return Candidate(NAME, run, prepare, result)


def attention() -> Candidate:
    """Its rotation and its `sdpa_attention_forward`.

    A mask is passed even where all is visible, as with a `StaticCache`: with one, a single query's heads are packed
    into rows, without one torch repeats the KV heads, which takes four times as long. `eager_attention_forward` is the
    slower at one query and at many.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Callable[..., tuple[Tensor, None]] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    rotated = rotation()

    def prepare(inputs: dict[str, Any]) -> SimpleNamespace:
        q, k, rope = inputs["q"], inputs["k"], inputs["rope"]
        mask = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=q.dtype, device=q.device)
        seen = visible(inputs)
        if seen is not None:
            mask.masked_fill_(~seen, torch.finfo(q.dtype).min)
        q_turn, k_turn = ([x[:, None] for x in _phases(inputs[p], rope, q)] for p in ("q_pos", "kv_pos"))
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1])
        return SimpleNamespace(q=q, k=k, v=inputs["v"], q_turn=q_turn, k_turn=k_turn, mask=mask, module=module)

    def run(s: SimpleNamespace) -> Tensor:
        return attend(s.module, rotated(s.q, s.q_turn), rotated(s.k, s.k_turn), s.v, s.mask)[0]

    return Candidate(NAME, run, prepare, lambda _, out: out.transpose(1, 2), note="phases and mask made beforehand")
