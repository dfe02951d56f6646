"""A weight once more, in fewer bytes: codes of 4 or 8 bits with a scale and an offset for each 32 elements of a row, as
quantised files hold them (GGUF's Q4_0, Q4_1, Q4_K and Q8_0 are of this form).

    weight[o, i] = scale[o, i // 32] * code[o, i] + offset[o, i // 32]

A decode step is bound by reading weights. On a CPU a few rows of x are multiplied with the packed weight, three or five
eighths of bf16's bytes, half that of fp32's: `fused_linear(..., packed=)` and `decoder_layers`. The layout:
`mc_packed_weight` in csrc/include/mc_kernels.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_same_device, check_shape, check_tensor, describe

BLOCK = 32
ROWS = 16
# Of a block of 16 rows: four bits of its codes, and its scales and offsets.
_FOUR_BITS = 256
_NUMBERS = 2 * 4 * ROWS


def packed_shape(rows: int, inputs: int, bits: int) -> tuple[int, int, int]:
    """Of a weight [rows, inputs]: groups of 16 rows, blocks of 32 elements, bytes. Raises ValueError for rows that are
    not whole blocks, and for bits other than 4 or 8."""
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
    if inputs % BLOCK:
        raise ValueError(f"packed: expected a weight with rows of a multiple of {BLOCK} elements, got {inputs}")
    return -(-rows // ROWS), inputs // BLOCK, bits // 4 * _FOUR_BITS + _NUMBERS


def packed_bits(packed: Tensor) -> int:
    """Of a packed weight's codes, as its shape tells."""
    return 8 if packed.shape[-1] > _FOUR_BITS + _NUMBERS else 4


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A packed weight that goes with a bf16 or fp32 one, until that one is changed.

    data: see `pack_weight`. address, version: of the weight when it had these values. A change of values is noticed as
    autograd notices it: writing through `.data` or NumPy goes unseen.
    """

    data: Tensor
    address: int
    version: int

    @classmethod
    def beside(cls, weight: Tensor, data: Tensor) -> PackedWeight:
        """What stands for `weight` [O, E], bf16 or fp32, as it is now. Raises TypeError or ValueError where it cannot,
        or where the weight was made in inference mode, in which nothing tells of changes."""
        check_packed(data, weight)
        if weight.is_inference():
            raise ValueError("weight: expected a tensor that was made outside of inference mode")
        return cls(data, weight.data_ptr(), weight._version)

    def of(self, weight: Tensor) -> Tensor | None:
        """The data, or None where the weight is another by now."""
        return self.data if (weight.data_ptr(), weight._version) == (self.address, self.version) else None


def check_packed(packed: Tensor, weight: Tensor, *, swiglu: bool = False) -> None:
    """Raise TypeError or ValueError where `packed` cannot stand for `weight` [O, E]: dtypes, shape, strides. Whether
    the values agree is not looked at."""
    check_tensor("packed", packed, (torch.uint8,))
    check_tensor("weight", weight, (torch.bfloat16, torch.float32))
    if packed.dim() != 3:
        raise ValueError(f"packed: expected 3 dimensions, got {describe(packed)}")
    check_shape("packed", packed, packed_shape(weight.shape[0], weight.shape[1], packed_bits(packed)), {})
    if not packed.is_contiguous():
        raise ValueError(f"packed: expected a contiguous tensor, got strides {list(packed.stride())}")
    if swiglu and weight.shape[0] % (2 * ROWS):
        raise ValueError(f"packed: expected a multiple of {2 * ROWS} rows with swiglu, got {weight.shape[0]}")
    check_same_device(("weight", weight), packed=packed)


def pack_weight(codes: Tensor, scale: Tensor, offset: Tensor | None = None, *, bits: int = 4) -> Tensor:
    """A packed weight from its parts, on their device.

    codes: [O, E] uint8, from 0 on, E a multiple of 32. scale, offset: [O, E / 32] fp32; offset None: 0. bits: of a
        code, 4 or 8.
    Returns uint8 of `packed_shape(O, E, bits)`, contiguous. Raises TypeError (dtype) or ValueError (shape, a code out
    of range).
    """
    check_tensor("codes", codes, (torch.uint8,))
    check_shape("codes", codes, ("O", "E"), {})
    rows, inputs = codes.shape
    groups, blocks, _ = packed_shape(rows, inputs, bits)
    if bits == 4 and bool((codes > 15).any()):
        raise ValueError(f"codes: expected 0..15, got {int(codes.max())}")
    numbers = {"scale": scale, "offset": torch.zeros_like(scale) if offset is None else offset}
    for name, x in numbers.items():
        check_tensor(name, x, (torch.float32,))
        check_shape(name, x, (rows, blocks), {})
    check_same_device(("codes", codes), **numbers)
    out = codes.new_empty(packed_shape(rows, inputs, bits))
    if not codes.numel():
        return out
    more = groups * ROWS - rows
    # Two neighbours as one number of 16 bits: [groups, r, blocks, q, k / 2, k % 2].
    padded = F.pad(codes, (0, 0, 0, more)).contiguous().view(torch.int16).view(groups, ROWS, blocks, 4, 2, 2)
    fours = [padded] if bits == 4 else [padded & 0x0F0F, padded >> 4 & 0x0F0F]
    for i, x in enumerate(fours):
        # [groups, r, blocks, q, byte of a word, e] -> [groups, blocks, q, r, e, byte]
        words = (x[..., 0] | x[..., 1] << 4).unsqueeze(-1).view(torch.uint8)
        place = out[..., _FOUR_BITS * i : _FOUR_BITS * (i + 1)].unflatten(-1, (4, ROWS, 2, 2))
        place.copy_(words.permute(0, 2, 3, 1, 5, 4))
    by_row = torch.empty(groups, blocks, 2, ROWS, dtype=torch.float32, device=codes.device)
    for i, x in enumerate(numbers.values()):
        by_row[:, :, i] = F.pad(x, (0, 0, 0, more)).view(groups, ROWS, blocks).transpose(1, 2)
    out[..., -_NUMBERS:] = by_row.view(torch.uint8).flatten(2)
    return out


def unpack_weight(packed: Tensor, rows: int, inputs: int) -> Tensor:
    """The weight [rows, inputs] fp32 of a packed one, each number rounded once. Raises TypeError or ValueError."""
    check_tensor("packed", packed, (torch.uint8,))
    if packed.dim() != 3:
        raise ValueError(f"packed: expected 3 dimensions, got {describe(packed)}")
    bits = packed_bits(packed)
    check_shape("packed", packed, packed_shape(rows, inputs, bits), {})
    groups, blocks, _ = packed.shape
    fours = []
    for i in range(bits // 4):
        nibbles = packed[..., _FOUR_BITS * i : _FOUR_BITS * (i + 1)].reshape(groups, blocks, 4, ROWS, 2, 2)
        four = torch.stack((nibbles & 15, nibbles >> 4), -1).flatten(-2)  # [groups, blocks, q, r, e, k]
        fours.append(four.permute(0, 3, 1, 2, 5, 4).reshape(groups * ROWS, blocks, BLOCK))
    codes = fours[0] if bits == 4 else fours[0] | fours[1] << 4
    numbers = packed[..., -_NUMBERS:].contiguous().view(torch.float32).view(groups, blocks, 2, ROWS)
    scale, offset = numbers.permute(2, 0, 3, 1).reshape(2, groups * ROWS, blocks, 1).double()
    return (codes.double() * scale + offset).float().view(groups * ROWS, inputs)[:rows].contiguous()
