"""Oracle of `collapse_`: blocks of entries of a cache are pooled, and the gists are written over them.

    1. gists[i] = gist_pool(entries in slots children[i])       i = 0 .. n-1
    2. entries move: (source, destination, count) one after the other, each as if through a copy
    3. slot slots[i, g] <- gists[i, g]

k, v [L,B,Hkv,S,D] written in place; children [n,K], slots [n,G], moves [s,3]. Every step sees what the one before has
left.
"""

from __future__ import annotations

from torch import Tensor

from ..registry import register
from .ref import gist_pool_ref


@register("collapse_", "ref")
def collapse_ref(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    children: Tensor,
    slots: Tensor,
    moves: Tensor,
) -> None:
    """See `collapse.py` for the arguments."""
    picked = children.flatten().to(k.device)
    blocks = [x.index_select(3, picked).flatten(0, 1).unflatten(2, children.shape) for x in (k, v)]
    gists = gist_pool_ref(blocks[0], blocks[1], w, b, m, c)
    for source, destination, count in moves.tolist():
        for x in (k, v):
            x.narrow(3, destination, count).copy_(x.narrow(3, source, count).clone())
    at = slots.flatten().to(k.device)
    for x, gist in zip((k, v), gists, strict=True):
        x.index_copy_(3, at, gist.flatten(2, 3).unflatten(0, x.shape[:2]))
