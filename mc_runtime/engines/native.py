"""The default engine: this package's own decoder."""

from __future__ import annotations

from torch import Tensor

from mc_runtime.model import DecoderOutput, KVStore

from .editable import CacheEngine


class NativeEngine(CacheEngine):
    """`Decoder`, as it is."""

    name = "native"

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
        output: DecoderOutput = self.decoder(
            x,
            positions,
            store,
            stop_layer=stop_layer,
            return_mass=return_mass,
            hidden_layer=hidden_layer,
            logits=logits,
        )
        return output

    def logits(self, hidden: Tensor) -> Tensor:
        return self.decoder.logits(hidden)
