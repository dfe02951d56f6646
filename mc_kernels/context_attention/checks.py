"""What `context_attention` asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    CACHE_DTYPES,
    FP8,
    INDEX_DTYPES,
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    is_finite,
)


def _usual(q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, kv_bias: Tensor | None) -> bool:
    """Whether a few looks show that every check would pass, as for a model's queries over its own cache. Between two
    decoded tokens the full checks, which know what to say, take several times as long: none of their code is in the
    caches then."""
    if type(q) is not Tensor:
        return False
    device, dtype = q.device, q.dtype
    for x in (q, k, v):
        if type(x) is not Tensor or x.dtype is not dtype or x.device != device or x.dim() != 4 or x.stride(3) != 1:
            return False
    for x in (q_pos, kv_pos):
        if type(x) is not Tensor or x.dtype not in INDEX_DTYPES or x.device != device:
            return False
    batch, heads, queries, dims = q.shape
    kv_heads, slots = k.shape[1], k.shape[2]
    if kv_bias is not None and (
        type(kv_bias) is not Tensor
        or kv_bias.dtype not in ORACLE_DTYPES
        or kv_bias.device != device
        or kv_bias.shape != (batch, slots)
    ):
        return False
    return (
        dtype in ORACLE_DTYPES
        and dims > 0
        and kv_heads > 0
        and heads % kv_heads == 0
        and k.shape == v.shape == (batch, kv_heads, slots, dims)
        and q_pos.shape == (batch, queries)
        and kv_pos.shape == (batch, slots)
    )


def _check_scales(
    k: Tensor, scales: dict[str, Tensor | None], leaves: dict[str, Tensor | None], dims: dict[str, int]
) -> None:
    """Of an fp8 cache both scales, of any other none; and then no gradient is wanted."""
    for name, scale in scales.items():
        if k.dtype != FP8:
            if scale is not None:
                raise ValueError(f"{name}: expected None with keys and values that are not float8_e4m3fn, got a tensor")
            continue
        if scale is None:
            raise ValueError(f"{name}: expected a tensor [Hkv] with float8_e4m3fn keys and values, got None")
        check_tensor(name, scale, (torch.float32,))
        check_shape(name, scale, ("Hkv",), dims)
    for name, x in leaves.items():
        if k.dtype == FP8 and torch.is_grad_enabled() and x is not None and x.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient with float8_e4m3fn keys and values (no backward)"
            )


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    kv_pos: Tensor,
    sigma: Tensor | None,
    kv_bias: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    scale: float | None,
) -> None:
    """Raises TypeError or ValueError where an argument of `context_attention`, `rope` aside, is not what it asks."""
    rare = sigma is not None or k_scale is not None or v_scale is not None or scale is not None
    if not rare and not torch.compiler.is_compiling() and _usual(q, k, v, q_pos, kv_pos, kv_bias):
        return
    check_tensor("q", q, ORACLE_DTYPES)
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, CACHE_DTYPES)
    for name, x in (("q_pos", q_pos), ("kv_pos", kv_pos)):
        check_tensor(name, x, INDEX_DTYPES)
    dims: dict[str, int] = {}
    check_shape("q", q, ("B", "Hq", "T", "D"), dims)
    check_shape("k", k, ("B", "Hkv", "S", "D"), dims)
    check_shape("v", v, ("B", "Hkv", "S", "D"), dims)
    check_shape("q_pos", q_pos, ("B", "T"), dims)
    check_shape("kv_pos", kv_pos, ("B", "S"), dims)
    for name, optional in (("sigma", sigma), ("kv_bias", kv_bias)):
        if optional is not None:
            check_tensor(name, optional, ORACLE_DTYPES)
            check_shape(name, optional, ("B", "S"), dims)
    check_same_dtype(("k", k) if k.dtype == FP8 else ("q", q), k=k, v=v)
    _check_scales(k, {"k_scale": k_scale, "v_scale": v_scale}, {"q": q, "k": k, "v": v, "kv_bias": kv_bias}, dims)
    check_same_device(
        ("q", q), k=k, v=v, q_pos=q_pos, kv_pos=kv_pos, sigma=sigma, kv_bias=kv_bias, k_scale=k_scale, v_scale=v_scale
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_contiguous_rows(name, x)
    hq, hkv, d = dims["Hq"], dims["Hkv"], dims["D"]
    if hkv == 0 or hq % hkv:
        raise ValueError(f"k: expected a number of heads that divides Hq={hq}, got Hkv={hkv}")
    if d == 0:
        raise ValueError("q: expected D >= 1, got D=0")
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale!r}")
