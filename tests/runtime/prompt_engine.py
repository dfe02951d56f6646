"""An engine behind a prompt-embedding interface, without a server: the decoder reads whole contexts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mc_runtime.engines import NativeEngine
from mc_runtime.engines.prompt import PromptEngine
from mc_runtime.model import Decoder
from mc_runtime.sampling import SamplingParams


class DecoderPrompts(PromptEngine):
    """Keeps what it was sent: `seen`."""

    name = "decoder-prompts"

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.seen: list[Tensor] = []

    def _complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, count: int, eos_ids: Collection[int]
    ) -> list[list[int]]:
        self.seen += contexts
        return NativeEngine(self.decoder).complete(contexts, params, count=count, eos_ids=eos_ids)

    def next_logits(self, rows: Tensor) -> Tensor:
        output = self.decoder(rows[None], torch.arange(len(rows))[None])
        return self.decoder.logits(output.hidden[0, -1])
