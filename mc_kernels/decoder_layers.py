"""Layers of a decoder over a cache of slots in one native call.

With norm(x, g) = x / sqrt(mean(x^2) + eps) * g, for each layer:

    q, k, v = qkv norm(x, attention_norm) + qkv_bias;   q = norm(q, q_norm), k = norm(k, k_norm) in each head
    k, v -> the entries' slots of the cache, unrotated
    x = x + out attention(q, slots of the cache) + out_bias
    x = x + down (silu(gate) * up),   gate, up = gate_up norm(x, ffn_norm)

and at the end, if wanted, x = norm(x, final_norm) and logits = head x of each sequence's last entry.

It is `fused_linear` and `context_attention` called one after the other (csrc/decoder_layers), with the same bits as
these give on a CPU; a normed q, k or result is rounded once. From Python, the five calls of a layer spend much of a
decode step outside their kernels: the stream of weights evicts the interpreter from the processor's caches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native
from .checks import FLOAT_DTYPES, check_contiguous_rows, check_same_dtype, check_shape, check_tensor
from .packed_weight import PackedWeight, check_packed, packed_bits
from .rope import RopeSpec


class LayerWeights(NamedTuple):
    """Of one layer, in the order of `mc_decoder_layer`; fp32, bf16 or fp16, each its own; on the CPU, contiguous."""

    attention_norm: Tensor  # [E]
    qkv: Tensor  # [(Hq + 2 Hkv) D, E]: all query heads, all key heads, all value heads
    qkv_bias: Tensor | None  # [(Hq + 2 Hkv) D]
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D], where there is a q_norm
    out: Tensor  # [E, Hq D]
    out_bias: Tensor | None  # [E]
    ffn_norm: Tensor  # [E]
    gate_up: Tensor  # [2F, E]: gate, then up
    down: Tensor  # [E, F]
    # The same before they were rounded to bf16, see `PackedWeight`, where there are such; passed over where a weight
    # has changed since.
    qkv_packed: PackedWeight | None = None
    out_packed: PackedWeight | None = None
    gate_up_packed: PackedWeight | None = None
    down_packed: PackedWeight | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, without packed ones."""
        return {name: x for name in _TENSORS if (x := getattr(self, name)) is not None}

    def packed(self) -> dict[str, tuple[Tensor, PackedWeight | None]]:
        """The weights that may be packed, each with what stands for it."""
        return {
            "qkv": (self.qkv, self.qkv_packed), "out": (self.out, self.out_packed),
            "gate_up": (self.gate_up, self.gate_up_packed), "down": (self.down, self.down_packed),
        }  # fmt: skip


class CacheSlots(NamedTuple):
    """Where the entries that are run put their keys and values, and what they attend to.

    k, v: [L, B, Hkv, S, D], keys unrotated, any strides with a contiguous last dimension. slots: [B, T] int64: slot of
    each entry, written before any entry attends. kv_pos: [B, used] int64: positions of slots [0, used), which are
    attended to; -1: an empty slot. kv_bias: [B, used], added to the logits of every head, or None.
    """

    k: Tensor
    v: Tensor
    slots: Tensor
    kv_pos: Tensor
    kv_bias: Tensor | None = None


_TENSORS = tuple(name for name in LayerWeights._fields if not name.endswith("_packed"))


class DecoderLayers:
    """See the module. Prepared once, called for every step.

    Holds references to the weights and looks at every call where they lie: values changed in place count from the next
    call on, and so do other storages, shapes and dtypes (`tensor.data = ...`). Several threads may call it at once,
    over caches of their own; weights must not be replaced meanwhile. No gradients: with gradients enabled, tensors that
    require them are refused. A copy, pickled or not, is prepared anew, from the weights that are copied with it.

    layers: their weights, of the same shapes. eps: of all norms. rope: how queries and, while they are read, keys turn,
        as it is now; None: not at all. Logits are scaled by D ** -0.5.
    Raises RuntimeError where there is no native library, TypeError and ValueError for weights that do not fit.
    """

    def __init__(self, layers: Sequence[LayerWeights], *, eps: float, rope: RopeSpec | None) -> None:
        if not (math.isfinite(eps) and eps >= 0):
            raise ValueError(f"eps: expected a finite number >= 0, got {eps!r}")
        if rope is not None and rope.inv_freq.dim() != 1:
            raise ValueError("rope: expected inv_freq [D_rot/2] (one for all layers), got one row per layer")
        self._layers, self._eps, self._rope = tuple(layers), eps, rope
        self._tensors = tuple(x for layer in self._layers for x in layer.tensors().values())
        if rope is not None:
            self._inv_freq = rope.inv_freq.to("cpu", torch.float64, copy=True)
        self._prepared = self._prepare()

    @property
    def eps(self) -> float:
        """Of all norms."""
        return self._eps

    def __reduce__(self) -> tuple[Any, ...]:
        return _with, (self._layers, self._eps, self._rope)

    def __len__(self) -> int:
        return len(self._layers)

    def __call__(
        self, x: Tensor, positions: Tensor, cache: CacheSlots, *, first: int = 0, end: int | None = None,
        mass: Tensor | None = None, final_norm: Tensor | None = None, head: Tensor | None = None,
        head_packed: Tensor | None = None, logits: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Run entries through layers [first, end).

        x: [B, T, E]; fp32, bf16 or fp16. positions: [B, T] int64; an entry at -1 attends to nothing.
        cache: of all layers, in x's dtype; see `CacheSlots`.
        mass: [end - first, B, used] fp32, contiguous, or None; gets the attention probability of each slot, summed over
            heads and entries.
        final_norm: [E] gain of a norm of the result, or None.
        head: [V, E], or None; with it logits: [B, V] in x's dtype, contiguous, get the product with the result of each
            sequence's last entry (T >= 1). head_packed: what stands for the head, see `fused_linear`, or None.

        Returns [B, T, E] in x's dtype, contiguous, aliasing nothing.
        Raises TypeError (dtype, device) or ValueError (shape, stride, slot) before anything is written.
        """
        end = len(self) if end is None else end
        if not isinstance(x, Tensor):
            check_tensor("x", x, FLOAT_DTYPES)
        if torch.is_grad_enabled():
            _check_no_gradient({"x": x, "k": cache.k, "v": cache.v}, self._tensors)
        out = torch.empty(x.shape, dtype=x.dtype, device="cpu")
        call = (
            first, end, x, positions, *cache, out, mass, final_norm, head, head_packed, logits, torch.get_num_threads(),
        )  # fmt: skip
        if not self._current().run(*call):
            # The library looks at what usually comes alone: the other calls are refused here, or brought into its form.
            call = self._checked(*call)
            if not self._current().run(*call):
                raise TypeError("decoder_layers: expected tensors that lie in memory")
        if not cache.k.is_inference():
            torch.autograd.graph.increment_version((cache.k, cache.v))
        return out

    def _checked(
        self, first: int, end: int, x: Tensor, positions: Tensor, k: Tensor, v: Tensor, slots: Tensor, kv_pos: Tensor,
        kv_bias: Tensor | None, out: Tensor, mass: Tensor | None, final_norm: Tensor | None, head: Tensor | None,
        head_packed: Tensor | None, logits: Tensor | None, n_threads: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The arguments of the library's call as it takes them. Raises what `__call__` raises for them."""
        check_tensor("x", x, FLOAT_DTYPES)
        tensors = {"positions": positions, "slots": slots, "kv_pos": kv_pos}
        for name, t in tensors.items():
            check_tensor(name, t, (torch.int64,))
        dims: dict[str, int] = {"L": len(self)}
        check_shape("x", x, ("B", "T", None), dims)
        check_shape("positions", positions, ("B", "T"), dims)
        for name, t in (("k", k), ("v", v)):
            check_tensor(name, t, FLOAT_DTYPES)
            check_shape(name, t, ("L", "B", "Hkv", "S", "D"), dims)
            check_contiguous_rows(name, t)
        check_same_dtype(("x", x), k=k, v=v)
        check_shape("slots", slots, ("B", "T"), dims)
        check_shape("kv_pos", kv_pos, ("B", "used"), dims)
        tensors |= {"x": x, "k": k, "v": v}
        if kv_bias is not None:
            check_tensor("kv_bias", kv_bias, FLOAT_DTYPES)
            check_shape("kv_bias", kv_bias, ("B", "used"), dims)
            tensors["kv_bias"] = kv_bias
        if self._rope is not None:
            self._rope.check_head_dim(dims["D"])
        if mass is not None:
            check_tensor("mass", mass, (torch.float32,))
            check_shape("mass", mass, (end - first, "B", "used"), dims)
            if not mass.is_contiguous():
                raise ValueError(f"mass: expected a contiguous tensor, got strides {mass.stride()}")
            tensors["mass"] = mass
        if final_norm is not None:
            check_tensor("final_norm", final_norm, FLOAT_DTYPES)
            check_shape("final_norm", final_norm, (x.shape[2],), {})
            tensors["final_norm"] = final_norm = final_norm.contiguous()
        if head is not None:
            check_tensor("head", head, FLOAT_DTYPES)
            check_shape("head", head, ("V", x.shape[2]), dims)
            check_tensor("logits", logits, FLOAT_DTYPES)
            assert logits is not None
            check_shape("logits", logits, ("B", "V"), dims)
            check_same_dtype(("x", x), logits=logits)
            if not logits.is_contiguous():
                raise ValueError(f"logits: expected a contiguous tensor, got strides {logits.stride()}")
            tensors |= {"head": head, "logits": logits}
            head = head.contiguous()
        elif logits is not None or head_packed is not None:
            raise ValueError("head: expected a tensor beside logits or head_packed, got None")
        if head_packed is not None and head is not None:
            check_packed(head_packed, head)
        _check_on_cpu(tensors)
        x, positions, slots, kv_pos = (t.contiguous() for t in (x, positions, slots, kv_pos))
        kv_bias = native.array(kv_bias, torch.float32)
        return (
            first, end, x, positions, k, v, slots, kv_pos, kv_bias, out, mass, final_norm, head, head_packed, logits,
            n_threads,
        )  # fmt: skip

    def _current(self) -> Any:
        """The library's object, made again where a weight has moved."""
        prepared = self._prepared
        if prepared.moved():
            self._prepared = prepared = self._prepare()
        return prepared

    def _prepare(self) -> Any:
        given, counted = [], []
        for layer in self._layers:
            tensors, parts = layer.tensors(), []
            for name, t in tensors.items():
                check_tensor(name, t, FLOAT_DTYPES)
                check_contiguous_rows(name, t)
            _check_on_cpu(tensors)
            for name, (weight, packed) in layer.packed().items():
                data = None if packed is None else packed.of(weight)
                if data is not None:
                    check_packed(data, weight, swiglu=name == "gate_up")
                if packed is not None:
                    counted.append(weight)
                parts.append(None if data is None else (data.data_ptr(), packed_bits(data)))
            given.append((*(tensors.get(name) for name in _TENSORS), *parts))
        rope = None
        if self._rope is not None:
            freq = self._inv_freq
            rope = (freq.data_ptr(), len(freq), self._rope.interleaved, self._rope.attention_scaling)
        return native.library().DecoderLayers(given, counted, self._eps, rope)


def _with(layers: Sequence[LayerWeights], eps: float, rope: RopeSpec | None) -> DecoderLayers:
    return DecoderLayers(layers, eps=eps, rope=rope)


def _check_no_gradient(tensors: dict[str, Tensor], weights: Sequence[Tensor]) -> None:
    name = next((name for name, t in tensors.items() if t.requires_grad), None)
    if name is None and any(t.requires_grad for t in weights):
        name = "layers"
    if name is not None:
        raise ValueError(f"{name}: expected no gradient to be required (there is no backward; see torch.no_grad)")


def _check_on_cpu(tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        if t.device.type != "cpu":
            raise TypeError(f"{name}: expected a CPU tensor, got {t.device}")
