"""`gist_encode`, `lens_score` and `signed_score` on arrays of any kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import extension
from ..contracts import check_contiguous_rows, check_same_device, check_same_dtype, check_shape, describe
from ..weight_shapes import GIST_ENCODE, LENS_SCORE, POOLS, check_gist_encode, check_lens_score
from .device import Device
from .views import ALIGNMENT, FLOATS, Array, array, empty, hand_over

MAX_QUERIES = 16


def _named(arrays: Mapping[str, Any], shapes: Mapping[str, tuple[str, ...]]) -> dict[str, Array]:
    if arrays.keys() != shapes.keys():
        wanted, got = ", ".join(shapes), ", ".join(arrays) or "none"
        raise ValueError(f"arrays: expected {wanted}, got {got}")
    named = {name: array(f"weights.{name}", arrays[name], FLOATS, cuda=True) for name in shapes}
    for name, x in named.items():
        check_contiguous_rows(f"weights.{name}", x)
    return named


class GistEncodeWeights:
    """A GistNet, as `mc_kernels.GistEncodeWeights`.

    arrays: by the names of that class' tensors, with its shapes, of one dtype (fp32, bf16, fp16) and any kind, last
        dimension contiguous. They are read when the net first meets a dtype of blocks and kept in the library's form:
        make new weights after a change.
    n_heads, target_rms, max_block_size, pool, rope_theta: as there.

    Raises TypeError (dtype) or ValueError (name, shape, value), naming the field.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        *,
        n_heads: int,
        target_rms: float,
        max_block_size: int = 128,
        pool: str = "softmax",
        rope_theta: float = 10000.0,
    ) -> None:
        named = _named(arrays, GIST_ENCODE)
        check_gist_encode(named, n_heads, pool, rope_theta, target_rms, max_block_size)
        self.arrays = tuple(named.values())
        self.named = {f"weights.{name}": x for name, x in named.items()}
        self.constants = (n_heads, POOLS.index(pool), rope_theta, target_rms)
        self.embed_dim, self.n_gists = named["w_in"].shape[1], named["pool_q"].shape[0]
        self.n_heads, self.target_rms, self.max_block_size = n_heads, target_rms, max_block_size
        self.pool, self.rope_theta = pool, rope_theta
        self._packed: dict[tuple[str, str], npt.NDArray[np.uint8]] = {}

    def packed(self, dtype: str, n_threads: int) -> npt.NDArray[np.uint8]:
        """What the kernel reads for blocks of `dtype` at the instruction set level in use."""
        library, code = extension.library(), extension.dtype_code(dtype)
        key = dtype, library.cpu_isa()
        found = self._packed.get(key)
        if found is not None:
            return found
        views = [x.view() for x in self.arrays]
        size = library.gist_encode_packed_bytes(views, *self.constants, code)
        memory = np.empty(size + ALIGNMENT - 1, dtype=np.uint8)
        packed = memory[-memory.ctypes.data % ALIGNMENT :][:size]
        library.gist_encode_pack(views, *self.constants, code, packed.ctypes.data, size, n_threads)
        # No lock, which a child of fork() might find taken. Two threads may both pack: it costs time and nothing else.
        return self._packed.setdefault(key, packed)


def gist_encode(blocks: Any, weights: GistEncodeWeights, *, level: int = 1, n_threads: int = 0) -> Any:
    """Compress every window of K embeddings (or gists) into G gists: `mc_kernels.gist_encode` on arrays, the same bits.

    Args:
        blocks: [N, K, E] embeddings of tokens (level 1) or gists of the level below; fp32, bf16 or fp16; any strides
            >= 0 with a contiguous last dimension; 1 <= K <= weights.max_block_size.
        weights: its E is that of blocks. Its dtype may differ from blocks'.
        level: of the gists produced, >= 1.
        n_threads: as for `kv_splice_`.

    Returns:
        gists [N, G, E] in blocks' dtype, a fresh array of blocks' kind.

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does.
    """
    if not isinstance(weights, GistEncodeWeights):
        raise TypeError(f"weights: expected a mc_kernels.array.GistEncodeWeights, got {describe(weights)}")
    x = array("blocks", blocks, FLOATS, cuda=True)
    check_shape("blocks", x, ("N", "K", "E"), {"E": weights.embed_dim})
    if not 1 <= x.shape[1] <= weights.max_block_size:
        raise ValueError(f"blocks: expected 1 <= K <= {weights.max_block_size} (max_block_size), got K={x.shape[1]}")
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f"level: expected an int, got {describe(level)}")
    if level < 1:
        raise ValueError(f"level: expected at least 1, got {level}")
    check_contiguous_rows("blocks", x)
    check_same_device(("blocks", x), **weights.named)
    shape = (x.shape[0], weights.n_gists, x.shape[2])
    if x.device != "cpu":
        with Device(x) as device:
            there, views = device.empty(shape, x), [w.view() for w in weights.arrays]
            arguments = (*weights.constants, x.view(), there.view(), level)
            device.launch(lambda where: int(device.library.gist_encode(views, *arguments, where)))
            return there.given
    out = empty(shape, x.dtype, x)
    if x.shape[0]:
        packed = weights.packed(x.dtype, n_threads)
        extension.library().gist_encode(packed.ctypes.data, packed.size, x.view(), out.view(), level, n_threads)
    return hand_over(out)


class LensScoreWeights:
    """A LensNet, as `mc_kernels.LensScoreWeights`.

    arrays: by the names of that class' tensors, with its shapes, of one dtype (fp32, bf16, fp16) and any kind, last
        dimension contiguous; not copied. n_heads: as there.

    Raises TypeError (dtype) or ValueError (name, shape, value), naming the field.
    """

    def __init__(self, arrays: Mapping[str, Any], *, n_heads: int) -> None:
        named = _named(arrays, LENS_SCORE)
        check_lens_score(named, n_heads)
        self.arrays, self.n_heads = tuple(named.values()), n_heads
        self.named = {f"weights.{name}": x for name, x in named.items()}
        self.embed_dim = named["w_in"].shape[1]
        # F: what the head's input leaves after values, match and direct projections.
        self.n_features = named["head_in"].shape[1] - named["score_v"].shape[0] - n_heads - named["direct"].shape[0]


def _legal(legal: Any, dims: dict[str, int]) -> npt.NDArray[np.bool_] | None:
    if legal is None:
        return None
    given = array("legal", legal, ("bool",))
    check_shape("legal", given, ("N", 2), dims)
    return np.ascontiguousarray(given.numpy())


def lens_score(
    entries: Any, features: Any, queries: Any, weights: LensScoreWeights, *, legal: Any = None, n_threads: int = 0
) -> Any:
    """What every entry would gain expanded and cost collapsed: `mc_kernels.lens_score` on arrays, the same bits.

    Args:
        entries: [N, E] summary vectors; fp32, bf16 or fp16. features: [N, F] fp32. queries: [Q, E] in entries' dtype,
            1 <= Q <= 16. All with any strides >= 0 and a contiguous last dimension.
        weights: its E and F are those of entries and features. Its dtype may differ from entries'.
        legal: [N, 2] bool, may the entry be expanded, may it be collapsed; None where all may.
        n_threads: as for `kv_splice_`.

    Returns:
        scores [N, 2] fp32 in nats (gain of expanding, cost of collapsing), exactly 0 where not legal; a fresh array of
        entries' kind.

    Raises TypeError, ValueError or RuntimeError as `kv_splice_` does.
    """
    if not isinstance(weights, LensScoreWeights):
        raise TypeError(f"weights: expected a mc_kernels.array.LensScoreWeights, got {describe(weights)}")
    x, f, q = (
        array("entries", entries, FLOATS, cuda=True),
        array("features", features, ("float32",), cuda=True),
        array("queries", queries, FLOATS, cuda=True),
    )
    dims = {"E": weights.embed_dim, "F": weights.n_features}
    check_shape("entries", x, ("N", "E"), dims)
    check_shape("features", f, ("N", "F"), dims)
    check_shape("queries", q, ("Q", "E"), dims)
    if not 1 <= dims["Q"] <= MAX_QUERIES:
        raise ValueError(f"queries: expected 1 <= Q <= {MAX_QUERIES}, got Q={dims['Q']}")
    check_same_dtype(("entries", x), queries=q)
    check_same_device(("entries", x), features=f, queries=q, **weights.named)
    for name, part in (("entries", x), ("features", f), ("queries", q)):
        check_contiguous_rows(name, part)
    arguments = (x.view(), f.view(), q.view(), tuple(w.view() for w in weights.arrays), weights.n_heads)
    if x.device != "cpu":
        with Device(x) as device:
            allowed = None if legal is None else device.taken("legal", legal, ("bool",), "bool")
            if allowed is not None:
                check_shape("legal", allowed, ("N", 2), dims)
            there = device.empty((dims["N"], 2), "float32")
            rest = (0 if allowed is None else allowed.address, there.view())
            device.launch(lambda where: int(device.library.lens_score(*arguments, *rest, where)))
            return there.given
    mask, out = _legal(legal, dims), empty((dims["N"], 2), "float32", x)
    address = 0 if mask is None else mask.ctypes.data
    extension.library().lens_score(*arguments, address, out.view(), n_threads)
    return hand_over(out)


def signed_score(scores: Any, legal: Any = None, *, price: float = 0.0) -> Any:
    """Fold (expand_gain, collapse_cost) into one number per entry, positive to expand, negative to collapse:
    `mc_kernels.signed_score` on arrays, the same bits.

    Args:
        scores: [N, 2] fp32 in nats, as `lens_score` returns them.
        legal: [N, 2] bool as for `lens_score`, or None where all is legal.
        price: what the slots of one edit are worth, in nats.

    Returns:
        [N] fp32, 0 where no legal edit is worth its price: a fresh array of scores' kind.

    Raises TypeError (no array, dtype, device) or ValueError (shape, price), or RuntimeError where the package was built
    without its native library and scores are not NumPy's.
    """
    given = array("scores", scores, ("float32",))
    dims: dict[str, int] = {}
    check_shape("scores", given, ("N", 2), dims)
    if not math.isfinite(price):
        raise ValueError(f"price: expected a finite number, got {price!r}")
    mask, values = _legal(legal, dims), given.numpy()
    worth = np.maximum(np.stack((values[:, 0] - np.float32(price), np.float32(price) - values[:, 1]), axis=-1), 0)
    if mask is not None:
        worth = np.where(mask, worth, np.float32(0))
    out = empty((dims["N"],), "float32", given)
    out.held.view(np.float32)[:] = np.where(worth[:, 0] >= worth[:, 1], worth[:, 0], -worth[:, 1])
    return hand_over(out)
