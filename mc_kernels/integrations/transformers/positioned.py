"""What an attached model asks of its cache: where the entries of a forward stand, and which slots they see."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class PositionedCache(Cache):
    """A cache of unrotated keys whose entries have explicit positions. `attach`ed models take no other.

    One forward goes: `begin`, then for each layer `update` (the layers' own) and attention over what that returned,
    then `end`, also when the forward failed. Attention reads, and `begin` or the layers' `update` set,
        q_pos [B, T] int64, positions of the entries that are run (-1: padding, which sees nothing and is not seen);
        kv_pos [B, S] int64, positions of the slots that `update` returned (-1: empty);
        reach, one more than the largest of q_pos, known without asking the device;
        kv_bias [B, S], log-weights added to every head's logits, or None;
        sigma [B, S], see `context_attention`, or None;
        masses: None, or a list to which every layer appends the attention mass [B, S] that its slots got.
    """

    q_pos: Tensor
    kv_pos: Tensor
    reach: int
    kv_bias: Tensor | None = None
    sigma: Tensor | None = None
    masses: list[Tensor] | None = None

    def __init__(self, layers: Sequence[CacheLayerMixin]) -> None:
        super().__init__(layers=[*layers])

    @abstractmethod
    def begin(self, batch: int, length: int, keep: Tensor | None) -> None:
        """A forward over [batch, length] entries starts. keep: [batch, length] bool, False at padding; None: no
        padding. Raises ValueError, before anything changes, for what the cache cannot take."""

    @abstractmethod
    def end(self, *, failed: bool) -> None:
        """The forward is over. failed: it raised; the entries that it was to add are forgotten."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many of the ids that a call is given are in the cache already, which is what transformers asks here
        for: none. The text behind a Working Context has another length than the context, so `generate` and forwards
        take new tokens only, and positions come from the cache."""
        return 0


class PositionedLayer(CacheLayerMixin):
    """One layer of a `PositionedCache`. Its slots are allocated with the cache."""

    supports_early_init = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no use to an attached model, which builds no mask: visibility follows from positions."""
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        """-1: `generate` must not compare the number of ids with the number of slots."""
        return -1


def check_no_gradient(key_states: Tensor, value_states: Tensor) -> None:
    if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
        raise ValueError(
            "cache: it is edited in place and keeps no gradients; run the model under torch.no_grad() or "
            "torch.inference_mode()"
        )
