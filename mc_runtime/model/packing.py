"""Quantised weights kept as they are, beside the dequantised ones: from a GGUF file into `packed.weights`, and from
there to a decoder's linear maps.

A decode step then reads codes of 4 or 8 bits in place of bf16 or fp32 (`mc_kernels.packed_weight`); all else goes on
with the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mc_kernels import native
from mc_kernels.packed_weight import BLOCK, ROWS, PackedWeight, pack_weight
from mc_runtime.errors import ModelError
from mc_runtime.huge_pages import HugePages
from mc_runtime.model.layers import Layer

if TYPE_CHECKING:
    from mc_runtime.model.decoder import Decoder

# In safetensors' format, and not by that name: engines that are given the folder read every *.safetensors in it.
FILE = "packed.weights"
Bytes = NDArray[np.uint8]
Parts = tuple[Bytes, NDArray[np.float32], NDArray[np.float32]]
"""Codes [O, E], scale and offset [O, E / 32]."""


def _q4_0(rows: Bytes) -> Parts:
    blocks = rows.reshape(len(rows), -1, 18)
    scale = _half(blocks[..., :2])
    return _nibbles(blocks[..., 2:]), scale, -8 * scale


def _q4_1(rows: Bytes) -> Parts:
    blocks = rows.reshape(len(rows), -1, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q4_k(rows: Bytes) -> Parts:
    from gguf.quants import Q4_K

    blocks = rows.reshape(len(rows), -1, 144)  # of 256 elements
    scales, least = Q4_K.get_scale_min(np.ascontiguousarray(blocks[..., 4:16]).reshape(-1, 12))
    shape = (*blocks.shape[:2], 8)
    scale = _half(blocks[..., :2])[..., None] * scales.reshape(shape).astype(np.float32)
    offset = -_half(blocks[..., 2:4])[..., None] * least.reshape(shape).astype(np.float32)
    pairs = blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32)
    codes = np.stack((pairs & 15, pairs >> 4), 3)
    flat = (len(rows), -1)
    return codes.reshape(flat), scale.reshape(flat), offset.reshape(flat)


def _q8_0(rows: Bytes) -> Parts:
    blocks = rows.reshape(len(rows), -1, 34)
    scale = _half(blocks[..., :2])
    codes = blocks[..., 2:] ^ np.uint8(128)  # signed ones, from 0 on
    return codes.reshape(len(rows), -1), scale, -128 * scale


FORMATS: dict[str, tuple[Callable[[Bytes], Parts], int]] = {
    "Q4_0": (_q4_0, 4), "Q4_1": (_q4_1, 4), "Q4_K": (_q4_k, 4), "Q8_0": (_q8_0, 8)
}  # fmt: skip
"""GGUF's names of what can be packed: how its bytes are read, and the bits of a code."""


def _half(two_bytes: Bytes) -> NDArray[np.float32]:
    return np.ascontiguousarray(two_bytes).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(halves: Bytes) -> Bytes:
    """[O, blocks, 16] -> [O, 32 blocks]: the low halves of a block's bytes, then the high ones."""
    return np.concatenate((halves & 15, halves >> 4), -1).reshape(len(halves), -1)


def pack_rows(kind: str, rows: Bytes, values: NDArray[np.float32], order: Callable[[Any], Any]) -> Tensor | None:
    """A packed weight of a GGUF tensor's bytes [O, bytes]; None for kinds and shapes that cannot be packed.

    values: the tensor dequantised, [O, E]; what is packed equals it to the last bit, or is not used. order: brings rows
    into another order.
    """
    if kind not in FORMATS or rows.ndim != 2 or len(rows) % ROWS or values.shape[1] % BLOCK:
        return None
    read, bits = FORMATS[kind]
    codes, scale, offset = (torch.from_numpy(np.ascontiguousarray(part)) for part in read(rows))
    # In one rounding or two: the products of these formats are exact.
    exact = (codes.view(len(rows), -1, BLOCK) * scale[..., None]).add_(offset[..., None])
    if not torch.equal(exact.view(values.shape), torch.from_numpy(np.ascontiguousarray(values))):
        return None
    return pack_weight(
        *(torch.from_numpy(np.ascontiguousarray(order(x.numpy()))) for x in (codes, scale, offset)), bits=bits
    )


def save_packed(directory: Path, packed: dict[str, Tensor]) -> None:
    """Write the packed weights, by the names of the weights."""
    if packed:
        save_file(packed, directory / FILE)


def load_packed(directory: Path, decoder: Decoder) -> None:
    """Put the packed weights of a directory beside the decoder's: where there are such, the decoder is in bf16 or fp32
    on a CPU with the native library, and all rows of a map are packed alike."""
    path = directory / FILE
    on_cpu = decoder.dtype in (torch.bfloat16, torch.float32) and decoder.device.type == "cpu"
    if not (path.is_file() and on_cpu and native.available() is None):
        return
    memory = HugePages()
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for place in _places(decoder):
                if not names.issuperset(place.parts) or place.weight.is_inference():
                    continue
                tensors = [file.get_tensor(name) for name in place.parts]
                if len({x.shape[1:] for x in tensors}) > 1:  # quantised in different ways
                    continue
                data = memory.zeros((sum(len(x) for x in tensors), *tensors[0].shape[1:]), torch.uint8)
                torch.cat(tensors, out=data)
                setattr(place.module, place.attribute, PackedWeight.beside(place.weight, data))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be used: {error}; delete its folder to have it made again") from error


class _Place(NamedTuple):
    """A weight, the tensors that its rows come from, and where what stands for it is kept."""

    module: nn.Module
    attribute: str
    weight: Tensor
    parts: list[str]


def _places(decoder: Decoder) -> list[_Place]:
    head = "model.embed_tokens" if decoder.config.tied_embeddings else "lm_head"
    found = [_Place(decoder, "head_packed", decoder.head, [f"{head}.weight"])]
    for number, layer in enumerate(decoder.layers):
        assert isinstance(layer, Layer)
        for linear, names in (
            (layer.attention.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.attention.out, ("self_attn.o_proj",)),
            (layer.ffn.gate_up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.ffn.down, ("mlp.down_proj",)),
        ):
            parts = [f"model.layers.{number}.{name}.weight" for name in names]
            found.append(_Place(linear, "packed", linear.weight, parts))
    return found
