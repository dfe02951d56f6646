"""`gist_encode` on a CPU: csrc/gist_encode, a window's activations in cache, on the threads that torch is set to use.

The library reads weights in a packed form, about as large as the weights, twice that where products are fp32. It is
kept for the weights used last, at most KEPT of them, until their memory is freed, and made anew when a tensor's version
says that it has changed. A write that hides from the version counter (through `.data` or numpy) is not noticed, except
in weights that require a gradient: those are packed in every call.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..registry import register
from ..weight_shapes import POOLS
from .ref import gist_encode_backward_ref

KEPT = 64


def _supports(blocks: Tensor, mu: Tensor, *_: object) -> str | None:
    if blocks.device.type != "cpu":
        return f"expected CPU tensors, got {blocks.device}"
    return "fp64 is for the oracle" if torch.float64 in (blocks.dtype, mu.dtype) else None


class _PackedWeights:
    """Packed weights by the memory, version and use of what they were made from."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Any, tuple[Tensor, list[Any]]] = OrderedDict()
        self.renew_lock()

    def renew_lock(self) -> None:
        """In a child of fork() the lock may be held by a thread that is not there."""
        self._lock = threading.RLock()  # a finalizer may run while its own thread holds it

    def get(self, tensors: tuple[Tensor, ...], dtype: torch.dtype, *constants: Any) -> Tensor:
        library = native.library()
        what = (dtype, library.cpu_isa(), *constants)
        # No version, or weights that are trained: checkpoints and differences are written to them through `.data`.
        if any(x.is_inference() or x.requires_grad for x in tensors):
            return self._pack(tensors, dtype, *constants)
        memory = tuple((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in tensors)
        key = (what, memory, tuple(x._version for x in tensors))
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found[0]
        packed = self._pack(tensors, dtype, *constants)
        # Storages rather than tensors: a compiled caller hands over new tensors on the same memory in every call.
        owners = [weakref.ref(x.untyped_storage(), lambda _: self._drop(key)) for x in tensors]
        with self._lock:
            for other in [k for k in self._kept if k[:2] == key[:2]]:  # an older version
                del self._kept[other]
            self._kept[key] = packed, owners
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return packed

    def _drop(self, key: Any) -> None:
        with self._lock:
            self._kept.pop(key, None)

    @staticmethod
    def _pack(tensors: tuple[Tensor, ...], dtype: torch.dtype, *constants: Any) -> Tensor:
        library, code = native.library(), native.dtype_code(dtype)
        size = library.gist_encode_packed_bytes(tensors, *constants, code)
        memory = torch.empty(size + 63, dtype=torch.uint8)
        packed = memory[-memory.data_ptr() % 64 :][:size]
        library.gist_encode_pack(tensors, *constants, code, packed.data_ptr(), size, torch.get_num_threads())
        return packed


_packed = _PackedWeights()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _packed.renew_lock())


@register("gist_encode", "cpu", available=native.available, supports=_supports)
def gist_encode_cpu(
    blocks: Tensor, mu: Tensor, w_in: Tensor, level_emb: Tensor, attn_norm: Tensor, qkv: Tensor, attn_out: Tensor,
    ffn_norm: Tensor, gate_up: Tensor, down: Tensor, final_norm: Tensor, pool_q: Tensor, w_out: Tensor, gain: Tensor,
    level: int, n_heads: int, pool: str, rope_theta: float, target_rms: float,
) -> Tensor:  # fmt: skip
    """Returns gists [N,G,E] in blocks' dtype. Matrix products take bf16 where blocks and weights are bf16 and the
    processor multiplies it, else fp32; sums are fp32."""
    out = torch.empty((blocks.shape[0], pool_q.shape[0], blocks.shape[2]), dtype=blocks.dtype)
    if blocks.shape[0] == 0:
        return out
    given = (
        mu, w_in, level_emb, attn_norm, qkv, attn_out, ffn_norm, gate_up, down, final_norm, pool_q, w_out, gain
    )  # fmt: skip
    tensors = tuple(x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous() for x in given)
    packed = _packed.get(tensors, blocks.dtype, n_heads, POOLS.index(pool), rope_theta, target_rms)
    native.library().gist_encode(packed.data_ptr(), packed.shape[0], blocks, out, level, torch.get_num_threads())
    return out


@register("gist_encode_backward", "cpu", supports=_supports)
def gist_encode_backward_cpu(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The oracle's: it recomputes the forward from the inputs."""
    return gist_encode_backward_ref(grad, *args)
