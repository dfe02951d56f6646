"""Exact keys and values of a long text, each token's computed on a sink and a sliding window: what methods that keep
the whole cache (InfLLM, Memorizing Transformers) search in. Read as contextual ingest reads it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from mc_runtime.errors import InputError
from mc_runtime.model import Decoder
from mc_runtime.model.layers import Attention, Layer
from mc_runtime.model.stores import ConcatStore

from ..pasts import layer_queries
from .base import History, Progress

# Longest text, in tokens: 23 kB per token for the default model.
MOST = 1 << 17
# Called with the number of a layer and its queries [B, Hq, T, D], unrotated, before the layer attends.
OnQueries = Callable[[int, Tensor], None]


def check_readable(name: str, history: History, *, remember: bool) -> None:
    """Raises InputError for what no reader of this sort can do: keep a conversation, or hold a longer text."""
    if remember:
        raise InputError(f"remember: {name} answers single questions only")
    if len(history.ids) > MOST:
        raise InputError(f"history: expected at most {MOST} tokens, got {len(history.ids)}")


@contextmanager
def watching_queries(decoder: Decoder, see: OnQueries) -> Iterator[None]:
    """Inside the block `see` is called by every layer of every forward."""

    def hook(module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        attention = cast(Attention, module)
        see(attention.layer, layer_queries(attention, arguments[0]))

    handles = [cast(Layer, layer).attention.register_forward_pre_hook(hook) for layer in decoder.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def read_windowed(
    decoder: Decoder,
    ids: Sequence[int],
    *,
    sink: int,
    window: int,
    chunk: int,
    see_chunk: Callable[[int, Tensor, Tensor], None],
    progress: Progress | None = None,
) -> None:
    """Run a text chunk by chunk; each sees the first `sink` tokens and `window` tokens before it.

    see_chunk: called with a chunk's first token and its k, v [L, Hkv, n, D], keys unrotated.
    """
    k_sink = v_sink = k_past = v_past = None
    for start in range(0, len(ids), chunk):
        part = torch.tensor([list(ids[start : start + chunk])], device=decoder.device)
        store, past = ConcatStore(), 0
        if k_past is not None and k_sink is not None and v_past is not None and v_sink is not None:
            k, v = torch.cat((k_sink, k_past), 3), torch.cat((v_sink, v_past), 3)
            past = k.shape[3]
            store = ConcatStore(k, v, torch.arange(past, device=decoder.device)[None])
        decoder(decoder.embed(part), torch.arange(past, past + part.shape[1], device=decoder.device)[None], store)
        keys, values = store.keys, store.values
        see_chunk(start, keys[:, 0, :, past:], values[:, 0, :, past:])
        if k_sink is None:
            k_sink, v_sink = keys[:, :, :, :sink], values[:, :, :, :sink]
        keys, values = keys[:, :, :, sink:], values[:, :, :, sink:]
        first = max(0, keys.shape[3] - window)
        k_past, v_past = keys[:, :, :, first:], values[:, :, :, first:]
        if progress is not None:
            progress(min(start + chunk, len(ids)))
