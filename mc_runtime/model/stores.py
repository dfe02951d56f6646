"""Where a decoder's layers write their keys and values, and read their context from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mc_runtime.errors import InputError


class KVStore(Protocol):
    """What a layer writes its keys and values to and reads the context from.

    Optional, looked up by name:
    `begin(positions [B, T])` is called once per forward, before the first layer;
    `kv_bias [B, S]` is added to the attention logits of every head, or None;
    `sigma [B, S]` damps the RoPE bands of spread-out entries, or None;
    `in_slots() -> CacheSlots | None`, called after `begin`: tensors that hold the keys and values of all layers, and
    where in them the entries being run belong. Layers may then be run as one native call, without `update`;
    `whole_cache() -> CacheSlots`, called instead of `begin`: the same with all slots of the cache, in use or not;
    `repeats`: forwards of as many entries over the same cache follow, which pays for recording one on a GPU.
    """

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take `k, v [B, Hkv, T, D]` (keys unrotated) of the entries being run; return the keys and values
        `[B, Hkv, S, D]` to attend to, these included, and `kv_pos [B, S]` int64 (-1: empty slot)."""
        ...


class SelfStore:
    """No context: the T entries of one forward attend to themselves."""

    def __init__(self) -> None:
        self._positions: Tensor | None = None

    def begin(self, positions: Tensor) -> None:
        self._positions = positions

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert self._positions is not None
        return k, v, self._positions


class ConcatStore:
    """A context of past keys and values that grows by `cat`: functional, differentiable, nothing is written in place.

    k, v: `[L, B, Hkv, S, D]`, keys unrotated, or both None for an empty context. pos: `[B, S]` int64, -1: empty.
    kv_bias: `[B, S]` for the past entries or None; entries that are run get 0.
    Every forward appends its entries. `keys`, `values` and `pos` give the whole in the same layout.
    """

    def __init__(
        self,
        k: Tensor | None = None,
        v: Tensor | None = None,
        pos: Tensor | None = None,
        *,
        kv_bias: Tensor | None = None,
    ) -> None:
        if (k is None) != (v is None) or (k is None) != (pos is None):
            raise InputError("ConcatStore: give k, v and pos, or none of them")
        self._k: list[Tensor] = []
        self._v: list[Tensor] = []
        if k is not None and v is not None and pos is not None:
            if k.dim() != 5 or k.shape != v.shape or pos.shape != (k.shape[1], k.shape[3]):
                raise InputError(
                    "ConcatStore: expected k, v [L, B, Hkv, S, D] and pos [B, S], "
                    f"got {tuple(k.shape)}, {tuple(v.shape)} and {tuple(pos.shape)}"
                )
            self._k, self._v = list(k.unbind(0)), list(v.unbind(0))
        self._pos = pos
        self.kv_bias = kv_bias

    def begin(self, positions: Tensor) -> None:
        """The entries that the coming updates append stand at `positions [B, T]`."""
        self._pos = positions if self._pos is None else torch.cat((self._pos, positions), dim=1)
        if self.kv_bias is not None:
            zeros = self.kv_bias.new_zeros(positions.shape)
            self.kv_bias = torch.cat((self.kv_bias, zeros), dim=1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `KVStore.update`; S counts the past entries first, then the T new ones."""
        assert self._pos is not None, "begin() comes before update()"
        if layer < len(self._k):
            self._k[layer] = torch.cat((self._k[layer], k), dim=2)
            self._v[layer] = torch.cat((self._v[layer], v), dim=2)
        else:
            self._k.append(k)
            self._v.append(v)
        return self._k[layer], self._v[layer], self._pos

    @property
    def keys(self) -> Tensor:
        """[L, B, Hkv, S, D], unrotated."""
        return torch.stack(self._k)

    @property
    def values(self) -> Tensor:
        """[L, B, Hkv, S, D]"""
        return torch.stack(self._v)

    @property
    def pos(self) -> Tensor:
        """[B, S] int64"""
        if self._pos is None:
            raise InputError("ConcatStore: nothing has been stored yet")
        return self._pos
