"""Memorizing Transformers (Wu et al. 2022) without training: at one middle layer each query also attends to the 32
nearest of all stored keys.

The rest is a window over the newest tokens. The learned gate that weighs memory against window needs training; here
both share one softmax. Stored keys are compared unrotated, as if they stood where the query stands.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from mc_kernels.rope import apply_rope
from mc_runtime.config import MemoryConfig
from mc_runtime.kv_cache import SlotWriter
from mc_runtime.model import LoadedModel
from mc_runtime.model.layers import Attention, Layer

from ..pasts import layer_queries
from .base import History, Opened, Progress, Question, Reply
from .plain import OpenedPlain
from .window import newest
from .windowed import MOST, check_readable, read_windowed

NEAREST = 32


class Memorizing:
    name = "kNN (Memorizing)"
    most: int | None = MOST

    def __init__(self, model: LoadedModel, system: Sequence[int], config: MemoryConfig) -> None:
        self.model, self.system, self.config = model, list(system), config

    def open(self, history: History, *, remember: bool = False, progress: Progress | None = None) -> Opened:
        check_readable(self.name, history, remember=remember)
        return OpenedMemorizing(self.model, self.system, self.config, history, progress)


class OpenedMemorizing(OpenedPlain):
    """See the module. 32 slots of the budget are those of the memory."""

    def __init__(
        self,
        model: LoadedModel,
        system: Sequence[int],
        config: MemoryConfig,
        history: History,
        progress: Progress | None,
    ) -> None:
        super().__init__(model, system, history, config.budget - NEAREST, newest, remember=False)
        c = model.config
        self.layer = c.n_layers // 2
        ids = [*self.system, *self.told.ids]
        shape = (c.n_kv_heads, len(ids), c.head_dim)
        self.k = torch.empty(shape, dtype=model.decoder.dtype, device=model.decoder.device)
        self.v = torch.empty_like(self.k)

        def keep(start: int, k: Tensor, v: Tensor) -> None:
            span = slice(start, start + k.shape[2])
            self.k[:, span], self.v[:, span] = k[self.layer], v[self.layer]

        read_windowed(
            model.decoder,
            ids,
            sink=len(self.system),
            window=config.ingest_window,
            chunk=config.ingest_chunk,
            see_chunk=keep,
            progress=progress,
        )

    @torch.inference_mode()
    def ask(self, question: Question) -> Reply:
        spans = self.choose(self.told, question, self.room(question))
        self.context.read([*self.system, *self.shown(spans)])  # the window itself is read without the memory
        head = len(self.system)
        with self._remembering(head, head + (spans[0][0] if spans else len(self.told.ids))):
            reply = super().ask(question)
        return replace(reply, slots=reply.slots + NEAREST)

    @contextmanager
    def _remembering(self, start: int, stop: int) -> Iterator[None]:
        """Inside the block the middle layer also attends to the nearest of the stored tokens [start, stop)."""
        k, v = self.k[:, start:stop], self.v[:, start:stop]

        def hook(module: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
            if k.shape[1] == 0:
                return output
            x, positions, store, rope, _ = arguments
            return attend_with_memory(cast(Attention, module), x, positions, store, rope, k, v), output[1]

        handle = cast(Layer, self.model.decoder.layers[self.layer]).attention.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def attend_with_memory(
    attention: Attention, x: Tensor, positions: Tensor, store: SlotWriter, rope: Any, k: Tensor, v: Tensor
) -> Tensor:
    """[B, T, E]: attention over the store, which holds the new entries already, and per query over the nearest of
    k, v [Hkv, N, D], in one softmax."""
    cache, used, layer = store.cache, store.used, attention.layer
    kv_pos = cache.pos[:, :used]
    local_k, local_v = cache.k[layer][:, :, :used].float(), cache.v[layer][:, :, :used].float()
    groups = (attention.n_kv_heads, -1)
    q = layer_queries(attention, x).float()  # [B, Hq, T, D]
    rotated = torch.stack([apply_rope(row, at, rope) for row, at in zip(q, positions, strict=True)])
    keys = torch.stack([apply_rope(row, at.clamp(min=0), rope) for row, at in zip(local_k, kv_pos, strict=True)])
    scale = attention.head_dim**-0.5
    local = torch.einsum("bhgtd,bhsd->bhgts", rotated.unflatten(1, groups), keys) * scale
    visible = (kv_pos[:, None] >= 0) & (kv_pos[:, None] <= positions[:, :, None])  # [B, T, S]
    local = local.masked_fill(~visible[:, None, None], float("-inf"))
    far = torch.einsum("bhgtd,hnd->bhgtn", q.unflatten(1, groups), k.float()) * scale
    best = far.topk(min(NEAREST, k.shape[1]), dim=-1)
    weights = torch.cat((local, best.values), -1).softmax(-1)
    out = torch.einsum("bhgts,bhsd->bhgtd", weights[..., :used], local_v)
    heads = torch.arange(k.shape[0], device=k.device)[None, :, None, None, None]
    out = out + torch.einsum("bhgtm,bhgtmd->bhgtd", weights[..., used:], v.float()[heads, best.indices])
    return attention.out(out.flatten(1, 2).transpose(1, 2).flatten(2).to(x.dtype))
