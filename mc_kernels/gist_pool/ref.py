"""Oracle of `gist_pool`: one learned softmax pooling of a block's keys and values per layer and KV head.

    x_j = [k_j; v_j]                          j = 0 .. K-1, [2D]
    n_j = x_j / sqrt(mean(x_j^2) + RMS_EPS)
    p_g = softmax_j(n_j . w_g + b_gj)
    y_g = sum_j p_gj x_j
    [k_gist_g; v_gist_g] = y_g + y_g M + c

k, v [R,Hkv,N,K,D] (R = L x batch, layer-major: row r uses layer r // (R/L)) -> [R,Hkv,N,G,D] each. Accumulates in fp32
(fp64 if k or the weights are). RMS_EPS is there only so that a zero vector gives n = 0; it is far below the
mean square of any real key or value. Empty R, Hkv or N give empty outputs. Nothing aliases the inputs.
x and n are never formed: key and value are reduced apart, and the norm scales the K logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..checks import accumulate_dtype
from ..registry import register

RMS_EPS = 1e-12
# Layers are taken together up to this many elements of k: few launches for one block, bounded memory for many.
TILE_ELEMENTS = 1 << 20


def _layer_tiles(k: Tensor, layers: int) -> Iterator[slice]:
    per_layer = max(1, k.numel() // layers)
    step = max(1, TILE_ELEMENTS // per_layer)
    for start in range(0, layers, step):
        yield slice(start, min(start + step, layers))


def _rows(x: Tensor) -> Tensor:
    """[l,B,H,N,G,2D] -> [l,H,B*N*G,2D], so that one matrix per layer and head multiplies all of them."""
    return x.transpose(1, 2).flatten(2, 4)


def _unrows(x: Tensor, like: Tensor) -> Tensor:
    l, b, h, n, g, d = like.shape
    return x.view(l, h, b, n, g, d).transpose(1, 2)


def _attend(k: Tensor, v: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """k, v [l,B,H,N,K,D] -> inv_rms [l,B,H,N,1,K], n.w and p [l,B,H,N,G,K], y [l,B,H,N,G,2D]."""
    d = k.shape[-1]
    wk, wv = w[:, None, :, None, :, :d], w[:, None, :, None, :, d:]
    inv_rms = (((k * k).sum(-1) + (v * v).sum(-1)) / (2 * d) + RMS_EPS).rsqrt().unsqueeze(-2)
    nw = (wk @ k.transpose(-1, -2) + wv @ v.transpose(-1, -2)) * inv_rms
    p = torch.softmax(nw + b[:, None, :, None], dim=-1)
    return inv_rms, nw, p, torch.cat((p @ k, p @ v), dim=-1)


@register("gist_pool", "ref")
def gist_pool_ref(k: Tensor, v: Tensor, w: Tensor, b: Tensor, m: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Returns k_gist, v_gist [R,Hkv,N,G,D] in k's dtype."""
    (r, h, n, _, d), (layers, _, g, _) = k.shape, w.shape
    k_gist, v_gist = k.new_zeros(r, h, n, g, d), v.new_zeros(r, h, n, g, d)
    if k_gist.numel() == 0:
        return k_gist, v_gist
    acc = torch.promote_types(accumulate_dtype(k.dtype), accumulate_dtype(w.dtype))
    split = (layers, r // layers)
    keys, values = k.unflatten(0, split), v.unflatten(0, split)
    k_out, v_out = k_gist.unflatten(0, split), v_gist.unflatten(0, split)
    for s in _layer_tiles(k, layers):
        _, _, _, y = _attend(keys[s].to(acc), values[s].to(acc), w[s].to(acc), b[s].to(acc))
        out = y + _unrows(_rows(y) @ m[s].to(acc), y) + c[s].to(acc)[:, None, :, None, None]
        k_out[s], v_out[s] = out[..., :d], out[..., d:]
    return k_gist, v_gist


@register("gist_pool_backward", "ref")
def gist_pool_backward_ref(
    grad_k: Tensor,
    grad_v: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    need_kv: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients for k, v, w, b, m, c in their dtypes; [0] for the groups not asked for.

    With o the gradient of the output, all recomputed from k and v:
        gy = o + o M^T;  dM = y^T o;  dc = sum o
        ds_gj = p_gj (gy_g . x_j - gy_g . y_g);  db = sum ds;  dw_g = sum_j ds_gj n_j
        dx_j = sum_g p_gj gy_g + (u_j - n_j (n_j . u_j) / 2D) / rms_j  with  u_j = sum_g ds_gj w_g
    """
    (r, _, _, _, d), layers = k.shape, w.shape[0]
    dk, dv = (torch.zeros(x.shape if need_kv else 0, dtype=x.dtype, device=x.device) for x in (k, v))
    dw, db, dm, dc = (torch.zeros(x.shape if need_weights else 0, dtype=x.dtype, device=x.device) for x in (w, b, m, c))
    if k.numel() == 0:
        return dk, dv, dw, db, dm, dc
    acc = torch.promote_types(accumulate_dtype(k.dtype), accumulate_dtype(w.dtype))
    split = (layers, r // layers)
    k_in, v_in, gk_in, gv_in = (x.unflatten(0, split) for x in (k, v, grad_k, grad_v))
    for s in _layer_tiles(k, layers):
        keys, values, wl, ml = k_in[s].to(acc), v_in[s].to(acc), w[s].to(acc), m[s].to(acc)
        inv_rms, nw, p, y = _attend(keys, values, wl, b[s].to(acc))
        o = torch.cat((gk_in[s].to(acc), gv_in[s].to(acc)), dim=-1)
        gy = o + _unrows(_rows(o) @ ml.transpose(-1, -2), o)
        gx = gy[..., :d] @ keys.transpose(-1, -2) + gy[..., d:] @ values.transpose(-1, -2)
        ds = p * (gx - (gy * y).sum(-1, keepdim=True))
        scaled = ds * inv_rms
        if need_weights:
            dw[s] = torch.cat((scaled @ keys, scaled @ values), dim=-1).sum(dim=(1, 3))
            db[s] = ds.sum(dim=(1, 3))
            dm[s] = _rows(y).transpose(-1, -2) @ _rows(o)
            dc[s] = o.sum(dim=(1, 3, 4))
        if need_kv:
            back = ((ds * nw).sum(-2, keepdim=True) * inv_rms * inv_rms / (2 * d)).transpose(-1, -2)  # [l,B,H,N,K,1]
            pt, st, wx = p.transpose(-1, -2), scaled.transpose(-1, -2), wl[:, None, :, None]
            dk.unflatten(0, split)[s] = pt @ gy[..., :d] + st @ wx[..., :d] - keys * back
            dv.unflatten(0, split)[s] = pt @ gy[..., d:] + st @ wx[..., d:] - values * back
    return dk, dv, dw, db, dm, dc
