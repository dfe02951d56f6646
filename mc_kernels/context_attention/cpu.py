"""`context_attention` on a CPU, composed of torch's own kernels: no compiler needed.

The forward is the native library's where there is one (cpu_native.py); what follows is for machines without, and for
the backward. Same contract as `ref`, batch row by batch row. The occupied slots of a row are taken in the order of
their positions: what a tile of queries sees is then a prefix of them, so holes are not read, the future is not
computed, and only keys between the tile's first and last query need a mask. The query heads of a group are stacked
against their KV head.
Many bf16 queries multiply in bf16 (logits and probabilities are rounded, the softmax is fp32), all else in fp32.
What follows from the positions alone is computed once per forward instead of once per layer.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..checks import FP8
from ..registry import register
from ..rope import phases
from . import cpu_native
from .cpu_backward import backward_row
from .ref import context_attention_backward_ref, context_attention_ref

# Queries of a tile: fewer leave out more of a causal prefill's future, more make larger products.
TILE_QUERIES = 128
MIN_TILE_QUERIES = 16
# Logits of a tile, at most (unless MIN_TILE_QUERIES have more): bounds the memory of many slots.
TILE_LOGITS = 1 << 21
# Below this fp32 products take no longer: the time goes into reading the keys.
MIN_BF16_QUERIES = 16
# Added to the base-2 logarithm of what a query does not see. Finite: no arithmetic on it gives NaN.
HIDDEN = -1e30
LOG2_E = math.log2(math.e)


def _supports(q: Tensor, k: Tensor, *_: object) -> str | None:
    if q.device.type != "cpu":
        return f"expected CPU tensors, got {q.device}"
    if k.dtype == FP8:
        return "it reads no float8_e4m3fn keys and values"
    return "fp64 is for the oracle" if q.dtype == torch.float64 else None


@functools.cache
def _has_bf16_products() -> bool:
    """Without the CPU's help (AVX-512) a product of bf16 matrices is many times slower than one of fp32."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@dataclass(frozen=True)
class _Row:
    """What follows from the positions of one batch row.

    order [n]: occupied slots by position (None: all, as they lie); kv_pos [n] in that order; q_turn [2, T, D] and
    k_turn [2, n, D]: see `_turned`, None without rope; tiles: (first query, end, keys that all of them see, keys that
    one of them sees), where that is not none.
    """

    order: Tensor | None
    kv_pos: Tensor
    q_turn: Tensor | None
    k_turn: Tensor | None
    tiles: tuple[tuple[int, int, int, int], ...]

    def ordered(self, x: Tensor, dim: int) -> Tensor:
        return x if self.order is None else x.index_select(dim, self.order)

    def restore_(self, into: Tensor, x: Tensor, dim: int) -> None:
        """into[the keys' slots] = x; other slots keep what they have."""
        if self.order is None:
            into.copy_(x)
        else:
            into.index_copy_(dim, self.order, x.to(into.dtype))


@functools.lru_cache(maxsize=4)
def _rows_of(
    q_pos: bytes, kv_pos: bytes, inv_freq: bytes | None, interleaved: bool, batch: int, heads: int, head_dim: int
) -> tuple[_Row, ...]:
    queries, slots = (np.frombuffer(bytearray(x), dtype=np.int64).reshape(batch, -1) for x in (q_pos, kv_pos))
    step = max(MIN_TILE_QUERIES, min(TILE_QUERIES, TILE_LOGITS // (heads * slots.shape[1])))
    # Tiles of one size: a last tile of few queries would cost as many calls as a full one.
    edges = np.linspace(0, queries.shape[1], -(-queries.shape[1] // step) + 1).astype(int).tolist()
    freq = None if inv_freq is None else torch.frombuffer(bytearray(inv_freq), dtype=torch.float64)
    rows = []
    for at, pos in zip(queries, slots, strict=True):
        order = np.flatnonzero(pos >= 0)
        order = order[np.argsort(pos[order], kind="stable")]
        ordered = pos[order]
        tiles = []
        for i, j in itertools.pairwise(edges):
            clear, seen = np.searchsorted(ordered, (at[i:j].min(), at[i:j].max()), side="right").tolist()
            if seen:
                tiles.append((i, j, clear, seen))
        as_they_lie = np.array_equal(order, np.arange(len(pos)))
        q_turn, k_turn = (
            None if freq is None else _full_turn(torch.from_numpy(x), freq, interleaved, head_dim)
            for x in (at, ordered)
        )
        order_or_none = None if as_they_lie else torch.from_numpy(order)
        rows.append(_Row(order_or_none, torch.from_numpy(ordered), q_turn, k_turn, tuple(tiles)))
    return tuple(rows)


def _full_turn(positions: Tensor, inv_freq: Tensor, interleaved: bool, head_dim: int) -> Tensor:
    """[2, n, D]: the cosine of each dimension's pair, and the sine with the sign that its partner enters with."""
    cos, sin = phases(positions, inv_freq)
    out = torch.stack((_full_width(cos, interleaved, head_dim, 1.0), _full_width(sin, interleaved, head_dim, 0.0)))
    half = len(inv_freq)
    out[1, :, slice(0, 2 * half, 2) if interleaved else slice(0, half)] *= -1
    return out


def _full_width(x: Tensor, interleaved: bool, head_dim: int, rest: float) -> Tensor:
    """[n, D_rot/2] -> [n, D]: each band at both of its dimensions, `rest` where nothing turns."""
    both = x.repeat_interleave(2, -1) if interleaved else torch.cat((x, x), -1)
    return torch.nn.functional.pad(both, (0, head_dim - both.shape[-1]), value=rest)


def _turned(x: Tensor, turn: Tensor | None, rotary: int, interleaved: bool, *, back: bool = False) -> Tensor:
    """x [H, n, D] rotated by turn [2, n, D] (`back`: by its transpose), a new fp32 tensor. As `rope.rotate`, but in
    long runs over memory."""
    out = torch.empty(x.shape, dtype=torch.float32).copy_(x)
    if turn is None:
        return out
    partner, half = torch.empty_like(out), rotary // 2
    if interleaved:
        partner[..., 0:rotary:2], partner[..., 1:rotary:2] = out[..., 1:rotary:2], out[..., 0:rotary:2]
    else:
        partner[..., :half], partner[..., half:rotary] = out[..., half:rotary], out[..., :half]
    partner[..., rotary:] = 0.0
    return out.mul_(turn[0]).addcmul_(partner, turn[1], value=-1.0 if back else 1.0)


def _split(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x fp32 -> [..., 3], whose sum is x: three bf16 columns of a factor carry all bits of an fp32 number."""
    high = x.to(dtype)
    rest = (x - high.float()).nan_to_num_(0.0, 0.0, 0.0)  # inf - inf
    middle = rest.to(dtype)
    return torch.stack((high, middle, (rest - middle.float()).to(dtype)), -1)


def _packed(x: Tensor, *columns: Tensor | float, dtype: torch.dtype) -> Tensor:
    """[x | three columns for each of `columns`], contiguous: terms that a product adds in its accumulator.

    columns: [..., 3] from `_split` in one factor meets 1.0 in the other.
    """
    d = x.shape[-1]
    out = torch.empty((*x.shape[:-1], d + 3 * len(columns)), dtype=dtype)
    out[..., :d] = x
    for i, column in enumerate(columns):
        out[..., d + 3 * i : d + 3 * i + 3] = column
    return out


def _by_kv_head(x: Tensor, heads: int, dim: int = 0) -> Tensor:
    """[Hq, T, ...] at `dim` -> a view [Hkv, T, g, ...]: the rows of a tile of queries lie together."""
    return x.unflatten(dim, (heads, -1)).transpose(dim + 1, dim + 2)


class _Call:
    """What forward and backward share: the rows of a batch, and how their queries and keys enter the products."""

    def __init__(
        self, q: Tensor, k: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
        attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float,
    ) -> None:  # fmt: skip
        (batch, heads, queries, head_dim), self.kv_heads = q.shape, k.shape[1]
        in_bf16 = q.dtype == torch.bfloat16 and queries >= MIN_BF16_QUERIES and _has_bf16_products()
        self.dtype = torch.bfloat16 if in_bf16 else torch.float32
        q_bytes, kv_bytes = (x.to(torch.int64).contiguous().numpy().tobytes() for x in (q_pos, kv_pos))
        freq = None if inv_freq is None else inv_freq.double().contiguous().numpy().tobytes()
        # Looked up by content: a cache's positions change in place.
        self.rows = _rows_of(q_bytes, kv_bytes, freq, interleaved, batch, heads, head_dim)
        self.pairing = (0 if inv_freq is None else 2 * len(inv_freq), interleaved)
        self.k_scale = 1.0 if inv_freq is None else attention_scaling
        self.q_scale = scale * self.k_scale
        self.damp = None
        if sigma is not None and inv_freq is not None:
            damp = torch.exp(-0.5 * (sigma.float()[..., None] * inv_freq.float()) ** 2)
            self.damp = _full_width(damp.flatten(0, 1), interleaved, head_dim, 1.0).view(batch, -1, head_dim)
        self.bias = None if kv_bias is None else kv_bias.float() * LOG2_E

    def largest_tile(self, heads: int) -> int:
        return heads * max((((j - i) * seen) for row in self.rows for i, j, _, seen in row.tiles), default=0)

    def k_turn(self, i: int) -> Tensor | None:
        turn = self.rows[i].k_turn
        return turn if turn is None or self.damp is None else turn * self.rows[i].ordered(self.damp[i], 0)

    def queries(self, q: Tensor, i: int, *columns: Tensor | float) -> Tensor:
        """[Hkv, T, g, D + c] of q [B, Hq, T, D]: times `keys`, the logits in units of log 2."""
        turned = _turned(q[i], self.rows[i].q_turn, *self.pairing).mul_(self.q_scale * LOG2_E)
        return _packed(_by_kv_head(turned, self.kv_heads), *columns, dtype=self.dtype)

    def keys(self, k: Tensor, i: int, *columns: Tensor | float) -> Tensor:
        """[Hkv, n, D + c] of k [B, Hkv, S, D], by position."""
        row = self.rows[i]
        turned = _turned(row.ordered(k[i], 1), self.k_turn(i), *self.pairing)
        if self.k_scale != 1.0:
            turned *= self.k_scale
        return _packed(turned, *columns, dtype=self.dtype)

    def row_bias(self, i: int) -> Tensor | None:
        return None if self.bias is None else self.rows[i].ordered(self.bias[i], 0)


@register("context_attention", "cpu", supports=_supports)
def context_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None, interleaved: bool,
    attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float, return_mass: bool,
    k_scale: None = None, v_scale: None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ref.context_attention_ref`; not of fp8 caches, so without scales."""
    if cpu_native.serves(q.shape[2]):
        return cpu_native.context_attention_native(
            q, k, v, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale, return_mass
        )
    if q.numel() == 0 or k.numel() == 0:
        return context_attention_ref(q, k, v, q_pos, kv_pos, None, False, 1.0, None, kv_bias, scale, return_mass)
    call = _Call(q, k, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale)
    out, lse = torch.zeros(q.shape, dtype=q.dtype), torch.full(q.shape[:3], float("-inf"), dtype=torch.float32)
    mass = torch.zeros((q.shape[0], k.shape[2]) if return_mass else (0,), dtype=torch.float32)
    outs, lses = (_by_kv_head(x, k.shape[1], 1) for x in (out, lse))
    scratch = torch.empty(call.largest_tile(q.shape[1]), dtype=torch.float32)
    for i, row in enumerate(call.rows):
        values = row.ordered(v[i], 1).to(call.dtype).contiguous()
        row_mass = torch.zeros(len(row.kv_pos) if return_mass else 0, dtype=torch.float32)
        _forward_row(
            call.queries(q, i), call.keys(k, i), values, q_pos[i], row, call.row_bias(i), outs[i], lses[i], row_mass,
            scratch,
        )  # fmt: skip
        if return_mass:
            row.restore_(mass[i], row_mass, 0)
    return out, lse, mass


def _forward_row(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, row: _Row, bias: Tensor | None, out: Tensor, lse: Tensor,
    mass: Tensor, scratch: Tensor,
) -> None:  # fmt: skip
    """q [Hkv, T, g, D], k [Hkv, n, D] and bias [n] with q k^T + bias in units of log 2, v [Hkv, n, D]; out
    [Hkv, T, g, D], lse [Hkv, T, g] are written where a query may see something, mass [n] (or [0]) grows. scratch: fp32,
    the largest tile."""
    hkv, _, g, _ = q.shape
    at = q_pos.repeat_interleave(g)[:, None]
    for i, j, clear, seen in row.tiles:
        product = torch.bmm(q[:, i:j].flatten(1, 2), k[:, :seen].mT)
        logits = scratch[: product.numel()].view(product.shape).copy_(product)
        if bias is not None:
            logits += bias[:seen]
        if clear < seen:
            logits[:, :, clear:] += (row.kv_pos[clear:seen] > at[i * g : j * g]) * HIDDEN
        # What is hidden, or has a bias of -inf, stays far below the least maximum: the sum of a blind query is 0.
        top = logits.amax(-1, keepdim=True).clamp_(min=HIDDEN / 10)
        total = logits.sub_(top).exp2_().sum(-1, keepdim=True)
        p = logits.mul_(total.clamp(min=1.0).reciprocal_())
        out[:, i:j] = torch.bmm(product.copy_(p), v[:, :seen]).view(hkv, j - i, g, -1)
        lse[:, i:j] = total.log2_().add_(top).div_(LOG2_E).view(hkv, j - i, g)
        if mass.numel():
            mass[:seen] += p.sum((0, 1))


@register("context_attention_backward", "cpu", supports=_supports)
def context_attention_backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor, inv_freq: Tensor | None,
    interleaved: bool, attention_scaling: float, sigma: Tensor | None, kv_bias: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `ref.context_attention_backward_ref`."""
    if q.dtype == torch.float32 or q.numel() == 0 or k.numel() == 0:
        return context_attention_backward_ref(
            grad_out, q, k, v, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale, out, lse
        )
    call = _Call(q, k, q_pos, kv_pos, inv_freq, interleaved, attention_scaling, sigma, kv_bias, scale)
    hkv = k.shape[1]
    dq, dk, dv = (torch.zeros(x.shape, dtype=q.dtype) for x in (q, k, v))
    dbias = torch.zeros(kv_bias.shape if kv_bias is not None else (0,), dtype=torch.float32)
    # Terms of a product: log2 p = q k + bias - lse, and dp - delta = do v - delta.
    minus_lse = _by_kv_head(_split((lse * -LOG2_E).masked_fill_(lse == float("-inf"), HIDDEN), call.dtype), hkv, 1)
    scratch = torch.empty(2, call.largest_tile(q.shape[1]), dtype=call.dtype)
    for i, row in enumerate(call.rows):
        do = grad_out[i].float()
        minus_delta = _split((do * out[i]).sum(-1).neg_(), call.dtype)
        bias = call.row_bias(i)
        q_bias, k_bias = ((), ()) if bias is None else ((1.0,), (_split(bias, call.dtype),))
        dq_row, dk_row, dv_row, dbias_row = backward_row(
            _packed(_by_kv_head(do, hkv), _by_kv_head(minus_delta, hkv), dtype=call.dtype),
            call.queries(q, i, minus_lse[i], *q_bias),
            call.keys(k, i, 1.0, *k_bias),
            _packed(row.ordered(v[i], 1), 1.0, dtype=call.dtype),
            q_pos[i], row.kv_pos, row.tiles, HIDDEN, kv_bias is not None, scratch,
        )  # fmt: skip
        turned = dq_row.transpose(1, 2).reshape(q.shape[1:])
        dq[i] = _turned(turned, row.q_turn, *call.pairing, back=True).mul_(call.q_scale)
        row.restore_(dk[i], _turned(dk_row, call.k_turn(i), *call.pairing, back=True).mul_(call.k_scale / LOG2_E), 1)
        row.restore_(dv[i], dv_row, 1)
        if kv_bias is not None:
            row.restore_(dbias[i], dbias_row, 0)
    return dq, dk, dv, dbias if kv_bias is None else dbias.to(kv_bias.dtype)
