"""Names, shapes and checks of the nets' weights, whatever kind of array holds them: no torch.

Names are in the order of the ops' schemas and of the C ABI. A name in a shape binds a size at its first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .contracts import Strided, check_same_device, check_same_dtype, check_shape

POOLS = ("softmax", "mean", "cls")
MAX_DIRECT = 16

GIST_POOL: dict[str, tuple[str, ...]] = {
    "w": ("L", "Hkv", "G", "2D"),
    "b": ("L", "Hkv", "G", "K"),
    "m": ("L", "Hkv", "2D", "2D"),
    "c": ("L", "Hkv", "2D"),
}
# G: the gists per block, or for other pools 1.
GIST_ENCODE: dict[str, tuple[str, ...]] = {
    "mu": ("E",),
    "w_in": ("Eg", "E"),
    "level_emb": ("n_levels", "Eg"),
    "attn_norm": ("layers", "Eg"),
    "qkv": ("layers", "3Eg", "Eg"),
    "attn_out": ("layers", "Eg", "Eg"),
    "ffn_norm": ("layers", "Eg"),
    "gate_up": ("layers", "2F", "Eg"),
    "down": ("layers", "Eg", "F"),
    "final_norm": ("Eg",),
    "pool_q": ("G", "Eg"),
    "w_out": ("E", "Eg"),
    "gain": ("one",),
}
LENS_SCORE: dict[str, tuple[str, ...]] = {
    "w_in": ("d", "E"),
    "read_norm": ("P", "d"),
    "read_q": ("P", "d", "d"),
    "read_k": ("P", "d", "E"),
    "read_v": ("P", "d", "E"),
    "read_out": ("P", "d", "d"),
    "mlp_norm": ("P", "d"),
    "mlp_gate_up": ("P", "2f", "d"),
    "mlp_down": ("P", "d", "f"),
    "score_norm": ("d",),
    "score_q": ("d", "E"),
    "score_k": ("d", "d"),
    "score_v": ("Hdv", "d"),
    "direct": ("J", "E"),
    "head_in": ("hidden", "X"),
    "head_bias": ("hidden",),
    "head_out": ("two", "hidden"),
    "head_out_bias": ("two",),
}


def _check_shapes(named: Mapping[str, Strided], shapes: Mapping[str, tuple[str, ...]], dims: dict[str, int]) -> None:
    for name, x in named.items():
        check_shape(f"weights.{name}", x, shapes[name], dims)


def _check_alike(named: Mapping[str, Strided]) -> None:
    """One dtype, one device."""
    first = next(iter(named))
    reference = (f"weights.{first}", named[first])
    check_same_dtype(reference, **{f"weights.{n}": x for n, x in named.items()})
    check_same_device(reference, **{f"weights.{n}": x for n, x in named.items()})


def _check_not_empty(dims: Mapping[str, int], *names: str) -> None:
    for name in names:
        if dims[name] == 0:
            raise ValueError(f"weights: expected {name} >= 1, got 0")


def check_gist_pool(named: Mapping[str, Strided]) -> None:
    dims: dict[str, int] = {}
    _check_shapes(named, GIST_POOL, dims)
    _check_not_empty(dims, "L", "Hkv", "G", "K", "2D")
    if dims["2D"] % 2:
        raise ValueError(f"weights.w: expected an even last dimension (key and value), got {dims['2D']}")
    _check_alike(named)


def check_gist_encode(
    named: Mapping[str, Strided], n_heads: int, pool: str, rope_theta: float, target_rms: float, max_block_size: int
) -> None:
    dims: dict[str, int] = {"one": 1}
    check_shape("weights.w_in", named["w_in"], GIST_ENCODE["w_in"], dims)
    check_shape("weights.down", named["down"], GIST_ENCODE["down"], dims)
    dims |= {"3Eg": 3 * dims["Eg"], "2F": 2 * dims["F"]}
    _check_shapes(named, GIST_ENCODE, dims)
    _check_not_empty(dims, "E", "Eg", "F", "G", "n_levels")
    _check_alike(named)
    if n_heads < 1 or dims["Eg"] % (2 * n_heads):
        raise ValueError(f"n_heads: expected heads of even width in Eg={dims['Eg']}, got {n_heads!r}")
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    if pool != "softmax" and dims["G"] != 1:
        raise ValueError(f"weights.pool_q: expected G=1 for pool {pool!r}, got G={dims['G']}")
    for name, value in (("target_rms", target_rms), ("rope_theta", rope_theta)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    if max_block_size < 1:
        raise ValueError(f"max_block_size: expected at least 1, got {max_block_size!r}")


def check_lens_score(named: Mapping[str, Strided], n_heads: int) -> None:
    dims: dict[str, int] = {"two": 2}
    check_shape("weights.w_in", named["w_in"], LENS_SCORE["w_in"], dims)
    check_shape("weights.mlp_down", named["mlp_down"], LENS_SCORE["mlp_down"], dims)
    dims["2f"] = 2 * dims["f"]
    _check_shapes(named, LENS_SCORE, dims)
    _check_not_empty(dims, "E", "d", "P")
    _check_alike(named)
    if n_heads < 1 or dims["d"] % n_heads or dims["Hdv"] % n_heads:
        raise ValueError(f"n_heads: expected a divisor of d={dims['d']} and H dv={dims['Hdv']}, got {n_heads!r}")
    if dims["J"] > MAX_DIRECT:
        raise ValueError(f"weights.direct: expected at most {MAX_DIRECT} rows, got {dims['J']}")
    least = dims["Hdv"] + n_heads + dims["J"]
    if dims["X"] < least:
        raise ValueError(f"weights.head_in: expected at least {least} columns before features, got {dims['X']}")
