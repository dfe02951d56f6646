"""What the splice tests share: a plain Python model of a cache's content and independent rotations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from mc_kernels import Edit, RopeSpec, SplicePlan, native
from mc_kernels.registry import IMPLS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Implementations that take CPU tensors here, `cpu` once per instruction set level of this machine.
BACKENDS = [
    name if name == "ref" else f"cpu-{level}"
    for name, impl in IMPLS["kv_splice_"].items()
    if name in ("ref", "cpu") and impl.available() is None
    for level in (native.isa_levels(matrix=False) if name == "cpu" else [""])
]
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS, indirect=True)


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, so that equality also holds for NaN and tells -0 from 0."""
    return x.detach().contiguous().view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def splice_list(entries: Sequence[int], edits: Sequence[Edit], new: Sequence[int]) -> list[int]:
    """The edits on a plain list; `new` holds the inserted entries of all edits in order."""
    out, rank, taken = [], 0, 0
    for edit in edits:
        out += entries[rank : edit.start]
        out += new[taken : taken + edit.insert]
        rank, taken = edit.start + edit.remove, taken + edit.insert
    assert taken == len(new)
    return out + list(entries[rank:])


def turn(x: Tensor, positions: Tensor, inv_freq: Tensor, interleaved: bool = False) -> Tensor:
    """fp64 rotation of x [..., n, D] at positions [n] by complex multiplication; inv_freq [D_rot/2] or one a row."""
    x, freq = x.double(), inv_freq.double()
    half = freq.shape[-1]
    angle = positions.double()[:, None] * freq[..., None, :]  # [n, half] or [R, n, half]
    if freq.dim() == 2:
        angle = angle[:, None]
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (rot[..., 0::2], rot[..., 1::2]) if interleaved else rot.chunk(2, -1)
    z = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)
    rot = torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved else torch.cat((z.real, z.imag), -1)
    return torch.cat((rot, rest), -1)


def plain_turn(x: Tensor, positions: Tensor, spec: RopeSpec) -> Tensor:
    """The rotation as model code writes it, in x's dtype (fp32 angles; no magnitude): the error rule's rival."""
    half = spec.inv_freq.shape[-1]
    angle = positions.float()[:, None] * spec.inv_freq.float()[..., None, :]
    if spec.inv_freq.dim() == 2:
        angle = angle[:, None]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    if spec.interleaved:
        a, b = rot[..., 0::2], rot[..., 1::2]
        rot = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = rot.chunk(2, -1)
        rot = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((rot, rest), -1)


@st.composite
def edits_of(draw: st.DrawFn, length: int, capacity: int) -> list[Edit]:
    out: list[Edit] = []
    rank, free = 0, capacity - length
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(rank, length))
        remove = draw(st.integers(0, min(6, length - start)))
        insert = draw(st.integers(0, min(6, free + remove)))
        out.append(Edit(start, remove, insert))
        rank, free = start + remove, free + remove - insert
    return out


@st.composite
def plans(draw: st.DrawFn, discipline: str) -> SplicePlan:
    capacity = draw(st.integers(0, 24))
    length = draw(st.integers(0, capacity))
    slots = draw(st.permutations(range(length))) if discipline == "slots" else None
    return SplicePlan.from_edits(
        length, draw(edits_of(length, capacity)), capacity=capacity, discipline=discipline, slots=slots
    )
