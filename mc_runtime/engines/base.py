"""`Engine`: what every engine can do, whether or not its cache can be edited.

The interface has two parts, because engines come in two kinds.

`Engine`       input vectors in, logits or tokens out: `embed`, `prefill`, `Reading.decode`, `complete`. An engine that
               keeps its cache to itself and takes prompt embeddings (a server for many users) implements this part and
               nothing else (`prompt.py`). To it a Working Context is a row of vectors: tokens, and gists of kind
               `embedding`; gists that are keys and values cannot be handed over. A changed layout is a new `complete`,
               whose unchanged beginning such engines recognise by themselves (prefix caching).
`CacheEngine`  (`editable.py`) also runs entries at any positions over a cache of ours, whose entries a splice replaces
               in place: what a `Session` needs for pooled and projected gists, and for edits that cost what they
               change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from mc_runtime.errors import InputError
from mc_runtime.model import Decoder, ModelConfig
from mc_runtime.sampling import Sampler, SamplingParams


class Reading(ABC):
    """A context that an engine has read. logits: [vocab], of the token that comes next."""

    logits: Tensor

    @abstractmethod
    def decode(self, token: int) -> Tensor:
        """Read one more token; returns the new `logits`."""


class Engine(ABC):
    """Runs the base model. decoder: its weights in this process, which the nets read (embeddings) whoever runs them."""

    name: ClassVar[str]

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    @property
    def config(self) -> ModelConfig:
        return self.decoder.config

    @property
    def dtype(self) -> torch.dtype:
        """Of input vectors, keys and values."""
        return self.decoder.dtype

    @property
    def device(self) -> torch.device:
        """Where input vectors are given and logits come back."""
        return self.decoder.device

    def embed(self, ids: Tensor) -> Tensor:
        """ids [B, T] int64 -> [B, T, E], the vectors that the model reads for tokens."""
        return self.decoder.embed(ids)

    @abstractmethod
    def prefill(self, rows: Tensor, *, room: int = 256) -> Reading:
        """Read a context from the start. rows: [N, E] in `dtype`, N >= 1, entries in timeline order, each at the
        position that is its rank. room: tokens that may be decoded after it. Raises InputError."""

    def complete(
        self, contexts: Sequence[Tensor], params: SamplingParams, *, count: int, eos_ids: Collection[int] = ()
    ) -> list[list[int]]:
        """Continue several contexts, each on its own. contexts: rows as in `prefill`. count: new tokens of each, at
        most (`params.max_new_tokens` and its stop strings are the caller's). Returns their token ids: fewer than
        `count` where a token of `eos_ids` came, which is not among them. Raises InputError."""
        for rows in contexts:
            self.check_rows(rows, count)
        return [self._continue(rows, params, count, eos_ids) for rows in contexts]

    def _continue(self, rows: Tensor, params: SamplingParams, count: int, eos_ids: Collection[int]) -> list[int]:
        sampler, reading, tokens = Sampler(params), self.prefill(rows, room=count), list[int]()
        while len(tokens) < count:
            token = sampler(reading.logits)
            if token in eos_ids:
                break
            tokens.append(token)
            if len(tokens) < count:
                reading.decode(token)
        return tokens

    def check_rows(self, rows: Tensor, room: int) -> None:
        width = self.config.embed_dim
        if rows.dim() != 2 or not len(rows) or rows.shape[1] != width or rows.dtype != self.dtype:
            raise InputError(f"rows: expected [N >= 1, {width}] {self.dtype}, got {list(rows.shape)} {rows.dtype}")
        self.check_room(len(rows), room)

    def check_room(self, entries: int, room: int) -> None:
        """Whether `room` tokens fit behind so many entries."""
        if room < 0 or entries + room > self.config.max_positions:
            raise InputError(
                f"room: expected 0 to {self.config.max_positions - entries} tokens behind {entries} entries, got {room}"
            )
