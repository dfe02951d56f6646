"""Backward of `context_attention` for one batch row on a CPU, tile of queries by tile of queries.

The closed form of the softmax's gradient (FlashAttention-2, Dao 2023): with p = exp(logits - lse) from the saved lse,
    dv = p^T do,  ds = p * (do v^T - rowsum(do * o)),  dq = ds k,  dk = ds^T q.
Both subtractions are part of a product: the factors carry them in extra columns, so that they happen in its fp32
accumulator, before the rounding. Scores are computed transposed, [keys, queries]: that is how the products that sum
over queries read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def backward_row(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, kv_pos: Tensor,
    tiles: Sequence[tuple[int, int, int, int]], hidden: float, with_bias: bool, scratch: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of T queries and of n keys and values in the order of their positions.

    Args:
        do: [Hkv, T, g, D + 3], q: [Hkv, T, g, D + c], k: [Hkv, n, D + c], v: [Hkv, n, D + 3], of one dtype: q k^T is
            log2 p and do v^T is dp - delta, wherever the key is visible.
        q_pos: [T], kv_pos: [n] in ascending order.
        tiles: (first query, end, keys that all of them see, keys that one of them sees).
        scratch: [2, the largest tile's logits] of that dtype, overwritten.
        hidden: number added to log2 p where the key is not visible.

    Returns:
        dq = ds k [Hkv, T, g, D] in that dtype, dk = ds^T q and dv [Hkv, n, D] fp32, and the sum of ds over heads and
        queries [n] fp32 ([0] unless `with_bias`).
    """
    hkv, t, g, _ = q.shape
    d = do.shape[-1] - 3
    dq = torch.zeros(hkv, t, g, d, dtype=q.dtype)
    dk, dv = torch.zeros(2, hkv, k.shape[1], d, dtype=torch.float32)
    dbias = torch.zeros(k.shape[1] if with_bias else 0, dtype=torch.float32)
    at = q_pos.repeat_interleave(g)
    for i, j, clear, seen in tiles:
        q_tile, do_tile, keys = q[:, i:j].flatten(1, 2), do[:, i:j].flatten(1, 2), k[:, :seen]
        p, ds = scratch[:, : hkv * seen * g * (j - i)].view(2, hkv, seen, -1)
        torch.bmm(keys, q_tile.mT, out=p)
        if clear < seen:
            p[:, clear:] += (kv_pos[clear:seen, None] > at[i * g : j * g]) * hidden
        p.exp2_()
        dv[:, :seen] += torch.bmm(p, do_tile[..., :d])
        torch.bmm(v[:, :seen], do_tile.mT, out=ds).mul_(p)
        dk[:, :seen] += torch.bmm(ds, q_tile[..., :d])
        dq[:, i:j] = torch.bmm(ds.mT, keys[..., :d]).view(hkv, j - i, g, d)
        if with_bias:
            dbias[:seen] += ds.sum((0, 2), dtype=torch.float32)
    return dq, dk, dv, dbias
