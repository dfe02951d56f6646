"""Hugging Face Transformers as the engine: its model computes, over this package's cache.

The model is built from the decoder's own weights, which it shares: nothing is downloaded or copied. Its attention
layers write to and read from the memory's store (`mc_kernels.integrations.transformers`), and linear maps on a CPU
go through `fused_linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from mc_kernels.integrations.transformers import PositionedCache, attach
from mc_kernels.integrations.transformers.positioned import PositionedLayer
from mc_runtime.model import Decoder, DecoderOutput, KVStore
from mc_runtime.model.stores import SelfStore

from .editable import CacheEngine
from .hf_model import transformers_model


class _StopForwardError(Exception):
    """Ends a forward where the caller wants no further layer."""


class _StoreLayer(PositionedLayer):
    def __init__(self, cache: _StoreCache, number: int) -> None:
        super().__init__()
        self.cache, self.number = cache, number

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values, self.cache.kv_pos = self.cache.store.update(self.number, key_states, value_states)
        return keys, values


class _StoreCache(PositionedCache):
    """A `KVStore` as transformers sees it, for one forward of entries at `positions`."""

    def __init__(self, store: KVStore, positions: Tensor, n_layers: int, *, return_mass: bool) -> None:
        super().__init__([_StoreLayer(self, number) for number in range(n_layers)])
        self.store, self.q_pos = store, positions
        # For sliding windows alone, which models of `ModelConfig` end before (`max_positions`).
        self.reach = 0
        self.masses = [] if return_mass else None

    def begin(self, batch: int, length: int, keep: Tensor | None) -> None:
        begin = getattr(self.store, "begin", None)
        if begin is not None:
            begin(self.q_pos)
        self.kv_bias, self.sigma = getattr(self.store, "kv_bias", None), getattr(self.store, "sigma", None)

    def end(self, *, failed: bool) -> None:
        """The store has no state of a forward that would have to be undone."""


class TransformersEngine(CacheEngine):
    """Llama, Mistral, Qwen2 and Qwen3 by transformers' own modules. Raises ImportError without transformers 5.16 or
    newer, ModelError for what transformers' class of the family does not compute."""

    name = "transformers"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.model = transformers_model(decoder, fused=True)
        self.attachment = attach(self.model)
        self._base: Any = self.model.get_decoder()

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
        self.decoder.check_forward(x, positions, stop_layer, hidden_layer, logits=logits)
        cache = _StoreCache(
            SelfStore() if store is None else store, positions, self.config.n_layers, return_mass=return_mass
        )
        taken: dict[int, Tensor] = {}
        with self._tapped({hidden_layer, stop_layer} - {None}, stop_layer, taken):
            try:
                hidden = self._base(inputs_embeds=x, **{self.attachment.cache_argument: cache}).last_hidden_state
            except _StopForwardError:
                assert stop_layer is not None
                hidden = taken[stop_layer]
        mass = torch.stack(cache.masses) if cache.masses else None
        tapped = None if hidden_layer is None else taken[hidden_layer]
        return DecoderOutput(hidden, mass, tapped, self.logits(hidden[:, -1]) if logits else None)

    @contextmanager
    def _tapped(self, wanted: set[int | None], stop_layer: int | None, taken: dict[int, Tensor]) -> Iterator[None]:
        """Keep what enters layer i (the stream after i layers; the final norm stands behind the last) for i in
        `wanted`, and end the forward at `stop_layer`."""
        stream = [*self._base.layers, self._base.norm]

        def tap(number: int) -> Any:
            def take(module: nn.Module, args: Any, kwargs: Any) -> None:
                taken[number] = args[0] if args else kwargs["hidden_states"]
                if number == stop_layer:
                    raise _StopForwardError

            return take

        handles = [
            stream[i].register_forward_pre_hook(tap(i), with_kwargs=True) for i in wanted if i is not None
        ]  # fmt: skip
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def logits(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.model.get_output_embeddings()(hidden))
