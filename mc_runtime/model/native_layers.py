"""A decoder's layers as one native call over a cache of slots: which decoders and forwards it serves.

It computes what `Layer` does with `fused=True`, with the same bits (but what is normed at the end, and a normed query
or key of Qwen3, which are rounded once, agree within rounding); it does not call the modules. So it serves only modules
that are exactly this package's, without hooks.
"""

from __future__ import annotations

import os
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from mc_kernels.decoder_layers import CacheSlots, DecoderLayers, LayerWeights
from mc_kernels.registry import ENV_BACKEND
from mc_kernels.rope import RopeSpec
from mc_runtime.model.layers import Attention, FeedForward, Layer, Linear, RMSNorm
from mc_runtime.model.module_tree import HOOKED, OTHER, ModuleTree
from mc_runtime.model.stores import KVStore

_PARTS = (Layer, Attention, FeedForward, Linear, RMSNorm)


class NativeLayers:
    """Prepares a decoder's layers when they are first run, and again when a module or a parameter has been replaced.

    A copy of a decoder, pickled or not, starts with nothing prepared.
    """

    def __init__(self) -> None:
        # In one piece: several threads may run a decoder.
        self._prepared: tuple[ModuleTree, RopeSpec, DecoderLayers | None] | None = None

    def __reduce__(self) -> tuple[type[NativeLayers], tuple[()]]:
        return NativeLayers, ()

    def run(
        self, layers: nn.ModuleList, x: Tensor, positions: Tensor, store: KVStore, rope: RopeSpec, n_layers: int,
        hidden_layer: int | None, return_mass: bool, norm: nn.Module | None,
        head: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None:  # fmt: skip
        """x after n_layers, normed with `norm` if that is not None; the masses [n_layers, B, used] if wanted; x after
        `hidden_layer` of them if that is not None; and the logits [B, vocab] of each row's last entry by `head` (its
        weight, and what stands for it), where that is given and the call serves it too. Or None where the layers have
        to be called one by one: nothing has been done then."""
        cache = _cache(x, store)
        call = None if cache is None else self._call(layers, rope)
        if cache is None or call is None or len(call) != len(cache.k):
            return None
        shape = (n_layers, *cache.kv_pos.shape)
        mass = torch.empty(shape, dtype=torch.float32) if return_mass else None
        tapped = x if hidden_layer == 0 else None
        stops = [n_layers] if hidden_layer in (None, 0, n_layers) else [hidden_layer, n_layers]
        first = 0
        # In the same call, where it is this package's and what is before it is not asked for.
        gain = norm.weight if hidden_layer != n_layers and _is_plain(norm, call.eps) else None
        logits, of_head = None, {}
        if head is not None and gain is not None and head[0].device.type == "cpu":
            logits = torch.empty((x.shape[0], len(head[0])), dtype=x.dtype)
            of_head = {"head": head[0], "head_packed": head[1], "logits": logits}
        for end in stops:
            part = None if mass is None else mass[first:end]
            last = {"final_norm": gain, **of_head} if end == n_layers else {}
            x = call(x, positions, cache, first=first, end=end, mass=part, **last)
            tapped = x if end == hidden_layer else tapped
            first = end
        return (x if norm is None or gain is not None else norm(x)), mass, tapped, logits

    def _call(self, layers: nn.ModuleList, rope: RopeSpec) -> DecoderLayers | None:
        prepared = self._prepared
        seen = OTHER if prepared is None or prepared[1] is not rope else prepared[0].look(layers)
        if prepared is None or seen == OTHER:
            self._prepared = prepared = ModuleTree(layers), rope, _prepare(layers, rope)
            seen = prepared[0].look(layers)
        return None if seen == HOOKED else prepared[2]


def _is_plain(norm: nn.Module | None, eps: float) -> TypeGuard[RMSNorm]:
    """Whether this is one of ours, with this eps and without hooks."""
    return type(norm) is RMSNorm and norm.eps == eps and not (norm._forward_hooks or norm._forward_pre_hooks)


def _cache(x: Tensor, store: KVStore) -> CacheSlots | None:
    """The store's slots, where the call can serve."""
    in_slots = getattr(store, "in_slots", None)
    if (
        in_slots is None
        or getattr(store, "sigma", None) is not None
        or os.environ.get(ENV_BACKEND, "") not in ("", "cpu")
        or torch.compiler.is_compiling()
        or torch_module._has_any_global_hook()
    ):
        return None
    cache: CacheSlots | None = in_slots()
    return None if cache is None or cache.k.dtype != x.dtype or cache.k.device.type != "cpu" else cache


def _prepare(layers: nn.ModuleList, rope: RopeSpec) -> DecoderLayers | None:
    """None where a module is another than ours, or the norms differ in eps."""
    modules = [m for layer in layers for m in layer.modules()]
    eps = {m.eps for m in modules if isinstance(m, RMSNorm)}
    if len(eps) != 1 or any(type(m) not in _PARTS for m in modules) or rope.inv_freq.dim() != 1:
        return None
    return DecoderLayers([_weights(layer) for layer in layers], eps=eps.pop(), rope=rope)


def _weights(layer: nn.Module) -> LayerWeights:
    assert isinstance(layer, Layer)
    attention, ffn = layer.attention, layer.ffn
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return LayerWeights(
        layer.attention_norm.weight,
        attention.qkv.weight,
        attention.qkv.bias,
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        attention.out.weight,
        attention.out.bias,
        layer.ffn_norm.weight,
        ffn.gate_up.weight,
        ffn.down.weight,
        attention.qkv.packed,
        attention.out.packed,
        ffn.gate_up.packed,
        ffn.down.packed,
    )
