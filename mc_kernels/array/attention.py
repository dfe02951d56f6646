"""`context_attention` on arrays of any kind."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import extension
from ..contracts import check_contiguous_rows, check_same_device, check_same_dtype, check_shape, describe
from .device import Device
from .rope import RopeSpec
from .views import FLOATS, Array, array, empty, floats, hand_over, integers


def _by_slot(name: str, given: Any, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
    if given is None:
        return None
    x = array(name, given, (*FLOATS, "float64"))
    check_shape(name, x, shape, {})
    return floats(x)


def _positions(name: str, given: Any, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    found = integers(name, given)
    if found.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got shape {list(found.shape)}")
    return found


def context_attention(
    q: Any,
    k: Any,
    v: Any,
    q_pos: Any,
    kv_pos: Any,
    rope: RopeSpec | None,
    *,
    sigma: Any = None,
    kv_bias: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    return_mass: bool = False,
    n_threads: int = 0,
) -> Any:
    """Attention over cache slots with RoPE applied to the keys while they are read: `mc_kernels.context_attention` on
    arrays, for few queries (decoding, insertion): its time grows with T beyond a handful.

    Args:
        q: [B, Hq, T, D] queries, unrotated; fp32, bf16 or fp16.
        k, v: [B, Hkv, S, D], keys unrotated, q's dtype, any strides >= 0 with a contiguous last dimension; Hkv divides
            Hq.
        q_pos: [B, T] integers, positions of the queries. kv_pos: [B, S] of the slots; -1 marks an empty one.
        rope: rotation of queries and keys (`inv_freq` [D_rot/2]), or None for none.
        sigma: [B, S] >= 0, spread of an entry's position in tokens, or None.
        kv_bias: [B, S], added to all logits, or None.
        scale: multiplies q.k; D**-0.5 by default.
        return_lse: also return lse [B, Hq, T] fp32. return_mass: also return mass [B, S] fp32.
        n_threads: as for `kv_splice_`.

    Returns:
        out [B, Hq, T, D] in q's dtype (0 where a query sees nothing), followed by lse and mass where asked: fresh
        arrays of q's kind. Entry s is visible to query t when 0 <= kv_pos[s] <= q_pos[t].

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does.
    """
    qq, kk, vv = (array(name, x, FLOATS, cuda=True) for name, x in (("q", q), ("k", k), ("v", v)))
    dims: dict[str, int] = {}
    check_shape("q", qq, ("B", "Hq", "T", "D"), dims)
    check_shape("k", kk, ("B", "Hkv", "S", "D"), dims)
    check_shape("v", vv, ("B", "Hkv", "S", "D"), dims)
    check_same_dtype(("q", qq), k=kk, v=vv)
    check_same_device(("q", qq), k=kk, v=vv)
    for name, x in (("q", qq), ("k", kk), ("v", vv)):
        check_contiguous_rows(name, x)
    batch, heads, queries, slots, d = (dims[name] for name in ("B", "Hq", "T", "S", "D"))
    if dims["Hkv"] == 0 or heads % dims["Hkv"]:
        raise ValueError(f"k: expected a number of heads that divides Hq={heads}, got Hkv={dims['Hkv']}")
    if d == 0:
        raise ValueError("q: expected D >= 1, got D=0")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
    if rope is not None:
        if not isinstance(rope, RopeSpec):
            raise TypeError(f"rope: expected a mc_kernels.array.RopeSpec or None, got {describe(rope)}")
        rope.check_head_dim(d)
        if rope.inv_freq.ndim != 1:
            raise ValueError("rope: expected inv_freq [D_rot/2] (one layer at a time), got one row per layer")
    elif sigma is not None:
        raise ValueError("sigma: expected None without rope (it damps rotary bands), got an array")
    scale = d**-0.5 if scale is None else float(scale)
    if qq.device != "cpu":
        return _on_device(qq, kk, vv, q_pos, kv_pos, rope, sigma, kv_bias, scale, return_lse, return_mass)
    # Held in names: the library gets addresses.
    q_at, kv_at = _positions("q_pos", q_pos, (batch, queries)), _positions("kv_pos", kv_pos, (batch, slots))
    spread, bias = _by_slot("sigma", sigma, (batch, slots)), _by_slot("kv_bias", kv_bias, (batch, slots))
    out, lse = empty(qq.shape, qq.dtype, qq), empty(qq.shape[:3], "float32", qq)
    mass = empty((batch, slots), "float32", qq) if return_mass else None
    freq = None if rope is None else rope.inv_freq
    extension.library().context_attention(
        qq.view(),
        kk.view(),
        vv.view(),
        q_at.ctypes.data,
        kv_at.ctypes.data,
        0 if freq is None else freq.ctypes.data,
        0 if freq is None else freq.shape[0],
        rope is not None and rope.interleaved,
        1.0 if rope is None else rope.attention_scaling,
        0 if spread is None else spread.ctypes.data,
        0 if bias is None else bias.ctypes.data,
        scale,
        out.view(),
        lse.address,
        0 if mass is None else mass.address,
        n_threads,
    )
    extras = ([lse] if return_lse else []) + ([mass] if mass is not None else [])
    return tuple(hand_over(x) for x in (out, *extras)) if extras else hand_over(out)


def _on_device(
    q: Array, k: Array, v: Array, q_pos: Any, kv_pos: Any, rope: RopeSpec | None, sigma: Any, kv_bias: Any,
    scale: float, return_lse: bool, return_mass: bool,
) -> Any:  # fmt: skip
    """Checked CuPy arrays, and what goes with them, which may lie here or there."""
    batch, slots = k.shape[0], k.shape[2]
    with Device(q) as device:
        at = [device.taken(name, x, ("int64", "int32"), "int64") for name, x in (("q_pos", q_pos), ("kv_pos", kv_pos))]
        check_shape("q_pos", at[0], (batch, q.shape[2]), {})
        check_shape("kv_pos", at[1], (batch, slots), {})
        by_slot: list[Array | None] = []
        for name, given in (("sigma", sigma), ("kv_bias", kv_bias)):
            x = None if given is None else device.taken(name, given, (*FLOATS, "float64"), "float32")
            if x is not None:
                check_shape(name, x, (batch, slots), {})
            by_slot.append(x)
        freq = None if rope is None else device.put(rope.inv_freq)
        out, lse = device.empty(q.shape, q), device.empty(q.shape[:3], "float32")
        mass = device.empty((batch, slots), "float32") if return_mass else None
        arguments = (
            *(x.view() for x in (q, k, v)),
            *(x.address for x in at),
            0 if freq is None else freq.address,
            0 if freq is None else freq.shape[0],
            rope is not None and rope.interleaved,
            1.0 if rope is None else rope.attention_scaling,
            *(0 if x is None else x.address for x in by_slot),
            scale,
            out.view(),
            lse.address,
            0 if mass is None else mass.address,
            0,  # scales of an fp8 cache: arrays have no such dtype
            0,
        )
        device.launch(lambda where: int(device.library.context_attention(*arguments, where)))
    extras = ([lse.given] if return_lse else []) + ([mass.given] if mass is not None else [])
    return (out.given, *extras) if extras else out.given
