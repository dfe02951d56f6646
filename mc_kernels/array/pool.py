"""`gist_pool` and `collapse_` on arrays of any kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import extension
from ..contracts import check_contiguous_rows, check_same_device, check_same_dtype, check_shape, describe
from ..memory import overlaps_itself, shares_memory
from ..weight_shapes import GIST_POOL, check_gist_pool
from .device import Device
from .views import FLOATS, Array, array, check_writable, empty, hand_over, integers


@dataclass(frozen=True, eq=False)
class GistPoolWeights:
    """One level's learned pooling, as `mc_kernels.GistPoolWeights`: w [L, Hkv, G, 2D], b [L, Hkv, G, K],
    m [L, Hkv, 2D, 2D], c [L, Hkv, 2D], of one dtype (fp32, bf16, fp16), any kind of array, last dimension contiguous;
    not copied.

    Raises TypeError (dtype) or ValueError (shape), naming the field.
    """

    w: Any
    b: Any
    m: Any
    c: Any
    # In the order of the op's schema.
    arrays: tuple[Array, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        named = {name: array(f"weights.{name}", getattr(self, name), FLOATS, cuda=True) for name in GIST_POOL}
        check_gist_pool(named)
        for name, x in named.items():
            check_contiguous_rows(f"weights.{name}", x)
        object.__setattr__(self, "arrays", tuple(named.values()))

    @classmethod
    def zeros(cls, layers: int, kv_heads: int, n_gists: int, block_size: int, head_dim: int) -> GistPoolWeights:
        """Untrained weights (L, Hkv, G, K, D) in fp32: every gist is the mean of its block's keys and values."""
        both, first = 2 * head_dim, (layers, kv_heads)
        shapes = ((n_gists, both), (n_gists, block_size), (both, both), (both,))
        return cls(*(np.zeros(first + shape, np.float32) for shape in shapes))

    @property
    def layers(self) -> int:
        return self.arrays[0].shape[0]

    @property
    def kv_heads(self) -> int:
        return self.arrays[0].shape[1]

    @property
    def n_gists(self) -> int:
        return self.arrays[0].shape[2]

    @property
    def block_size(self) -> int:
        return self.arrays[1].shape[3]

    @property
    def head_dim(self) -> int:
        return self.arrays[3].shape[2] // 2


def _check_weights(weights: object) -> None:
    if not isinstance(weights, GistPoolWeights):
        raise TypeError(f"weights: expected a mc_kernels.array.GistPoolWeights, got {describe(weights)}")


def _check_one_device(k: Array, v: Array, weights: GistPoolWeights) -> None:
    check_same_device(("k", k), v=v, **{f"weights.{n}": x for n, x in zip(GIST_POOL, weights.arrays, strict=True)})


def gist_pool(k: Any, v: Any, weights: GistPoolWeights, *, n_threads: int = 0) -> tuple[Any, Any]:
    """Pool every block of K cached keys and values into G gists: `mc_kernels.gist_pool` on arrays, the same bits.

    Args:
        k, v: [R, Hkv, N, K, D], keys unrotated; fp32, bf16 or fp16; any strides >= 0 with a contiguous last dimension.
            R = L x batch, layer-major.
        weights: of this level; its L divides R, its Hkv, K and D are those of k. Its dtype may differ from k's.
        n_threads: as for `kv_splice_`.

    Returns:
        k_gist, v_gist: [R, Hkv, N, G, D] in k's dtype, keys unrotated, fresh arrays of k's kind.

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does.
    """
    _check_weights(weights)
    kk, vv = array("k", k, FLOATS, cuda=True), array("v", v, FLOATS, cuda=True)
    dims: dict[str, int] = {}
    check_shape("k", kk, ("R", "Hkv", "N", "K", "D"), dims)
    check_shape("v", vv, ("R", "Hkv", "N", "K", "D"), dims)
    check_same_dtype(("k", kk), v=vv)
    _check_one_device(kk, vv, weights)
    w, b, _, _ = weights.arrays
    if dims["D"] == 0 or dims["K"] == 0:
        raise ValueError(f"k: expected K >= 1 and D >= 1, got {describe(kk)}")
    check_shape("weights.w", w, (None, "Hkv", None, 2 * dims["D"]), dims)
    check_shape("weights.b", b, (None, "Hkv", None, "K"), dims)
    if dims["R"] % weights.layers:
        raise ValueError(f"k: expected R that is a multiple of the weights' L={weights.layers}, got R={dims['R']}")
    check_contiguous_rows("k", kk)
    check_contiguous_rows("v", vv)
    shape = (*kk.shape[:3], weights.n_gists, dims["D"])
    if kk.device != "cpu":
        with Device(kk) as device:
            there = device.empty(shape, kk), device.empty(shape, kk)
            device.library.gist_pool(*(x.view() for x in (kk, vv, *weights.arrays, *there)), device.stream)
            return there[0].given, there[1].given
    gists = empty(shape, kk.dtype, kk), empty(shape, kk.dtype, kk)
    extension.library().gist_pool(*(x.view() for x in (kk, vv, *weights.arrays, *gists)), n_threads)
    return hand_over(gists[0]), hand_over(gists[1])


def _slots(name: str, given: Any, width: int, n_slots: int) -> npt.NDArray[np.int64]:
    found = integers(name, given)
    if found.ndim != 2 or found.shape[1] != width:
        raise ValueError(f"{name}: expected shape [n, {width}], got shape {list(found.shape)}")
    if found.size and (found.min() < 0 or found.max() >= n_slots):
        raise ValueError(f"{name}: expected slots in 0..{n_slots - 1}, got {found.min()}..{found.max()}")
    return found


def collapse_(
    k: Any, v: Any, weights: GistPoolWeights, children: Any, slots: Any, *, moves: Any = None, n_threads: int = 0
) -> None:
    """Collapse blocks of a KV cache in place: `mc_kernels.collapse_` on arrays, the same bits.

    Args:
        k, v: [L, B, Hkv, S, D] or [R, Hkv, S, D] (R = L x batch, layer-major), keys unrotated; as for `kv_splice_`.
            Written.
        weights: of the level of the gists; its dtype may differ from k's.
        children: [n, K] slots of each block's entries in timeline order.
        slots: [n, G] slot that each gist is written to.
        moves: [s, 3] (source, destination, count), executed after the pooling and before the gists are written, or
            None.
        n_threads: as for `kv_splice_`.

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does, before anything is written.
    """
    _check_weights(weights)
    kk, vv = array("k", k, FLOATS, cuda=True), array("v", v, FLOATS, cuda=True)
    dims = {"Hkv": weights.kv_heads, "D": weights.head_dim}
    shape = ("R", "Hkv", "S", "D") if kk.dim() == 4 else (weights.layers, "B", "Hkv", "S", "D")
    for name, x in (("k", kk), ("v", vv)):
        check_shape(name, x, shape, dims)
    check_same_dtype(("k", kk), v=vv)
    _check_one_device(kk, vv, weights)
    for name, x in (("k", kk), ("v", vv)):
        check_contiguous_rows(name, x)
        check_writable(name, x)
        if overlaps_itself(x):
            raise ValueError(f"{name}: expected a view without overlap, got {describe(x)}, strides {list(x.strides)}")
    if shares_memory(kk, vv):
        raise ValueError("v: expected memory apart from k, got views that share elements")
    if kk.dim() == 4 and dims["R"] % weights.layers:
        raise ValueError(f"k: expected R that is a multiple of the weights' L={weights.layers}, got R={dims['R']}")
    blocks = _slots("children", children, weights.block_size, dims["S"])
    to = _slots("slots", slots, weights.n_gists, dims["S"])
    if len(blocks) != len(to):
        raise ValueError(f"slots: expected one row for each of {len(blocks)} blocks, got {len(to)}")
    values, counts = np.unique(to, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"slots: expected each slot once, got {values[counts > 1][0]} twice")
    steps = np.zeros((0, 3), np.int64) if moves is None else integers("moves", moves)
    if steps.ndim != 2 or steps.shape[1] != 3:
        raise ValueError(f"moves: expected shape [*, 3], got shape {list(steps.shape)}")
    for i, (source, destination, count) in enumerate(steps.tolist()):
        if min(source, destination, count) < 0 or max(source, destination) + count > dims["S"]:
            raise ValueError(
                f"moves[{i}]: expected slots within {dims['S']}, got {source} to {destination}, {count} of them"
            )
    by_layer = (x.split_first(weights.layers) if x.dim() == 4 else x for x in (kk, vv))
    arguments = (
        *(x.view() for x in (*by_layer, *weights.arrays)),
        len(blocks),
        blocks.ctypes.data,
        to.ctypes.data,
        len(steps),
        steps.ctypes.data,
    )
    if kk.device == "cpu":
        extension.library().collapse(*arguments, n_threads)
        return
    with Device(kk) as device:
        device.launch(lambda where: int(device.library.collapse(*arguments, where)))
