"""`refocus_`: schema, checks, shape function. In place, no autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import (
    ORACLE_DTYPES,
    can_look_at,
    check_contiguous_rows,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    describe,
)
from ..cuda_backend import refuse, register_cuda
from ..gist_pool.weights import GistPoolWeights
from ..library import define_op
from ..memory import overlaps_itself, shares_memory
from . import ref as ref
from .state import GistStore, RefocusLists, RefocusRule, RefocusState

MAX_WEIGHTS = 4
_SCHEMA = (
    "(Tensor(a!) k, Tensor(b!) v, Tensor(c!) levels, Tensor(d!) index, Tensor(e!) slots, Tensor(f!) born,"
    " Tensor(g!) pos, Tensor(h!)? bias, Tensor(i!) numbers, Tensor(j!) edits, Tensor(l!) inserted, Tensor(m!) moves,"
    " Tensor(n!) children, Tensor(o!) wanted, Tensor k_store, Tensor v_store, Tensor store_keys, Tensor store_rows,"
    " Tensor scores, Tensor counts, Tensor pinned, Tensor[] weights, int block_size, int budget, int cooldown,"
    " int max_edits, float min_gain, float hysteresis, float gist_bias, str? backend) -> ()"
)


def _fake(*_: object) -> None:
    return None


_op = define_op("refocus_", _SCHEMA, _fake)
register_cuda(
    "refocus_", "mc_kernels.refocus.cuda", "refocus_cuda", lambda *args: refuse(*args[:21]) or refuse(*args[21])
)


def _check_array(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[str | int, ...], dims: dict[str, int]) -> None:
    check_tensor(name, x, (dtype,))
    check_shape(name, x, shape, dims)
    if not x.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {list(x.stride())}")


def _check_cache(k: Tensor, v: Tensor, store: GistStore, weights: Sequence[GistPoolWeights], block_size: int) -> int:
    """Returns the number of slots."""
    dims: dict[str, int] = {}
    for name, x, rows in (("k", k, "S"), ("v", v, "S"), ("store.k", store.k, "M"), ("store.v", store.v, "M")):
        check_tensor(name, x, ORACLE_DTYPES)
        check_shape(name, x, ("L", "Hkv", rows, "D"), dims)
        check_contiguous_rows(name, x)
    check_same_dtype(("k", k), **{"v": v, "store.k": store.k, "store.v": store.v})
    if not 1 <= len(weights) <= MAX_WEIGHTS:
        raise ValueError(f"weights: expected those of 1 to {MAX_WEIGHTS} levels, got {len(weights)}")
    for i, w in enumerate(weights):
        if not isinstance(w, GistPoolWeights):
            raise TypeError(f"weights[{i}]: expected GistPoolWeights, got {describe(w)}")
        got = (w.layers, w.kv_heads, w.n_gists, w.block_size, w.head_dim)
        if got != (dims["L"], dims["Hkv"], 1, block_size, dims["D"]):
            want = f"L={dims['L']}, Hkv={dims['Hkv']}, G=1, K={block_size}, D={dims['D']}"
            raise ValueError(f"weights[{i}]: expected {want}, got L, Hkv, G, K, D = {got}")
    if torch.is_grad_enabled():
        given = [("k", k), ("v", v), ("store.k", store.k), ("store.v", store.v)]
        for name, x in given + [(f"weights[{i}]", x) for i, w in enumerate(weights) for x in w.tensors()]:
            if x.requires_grad:
                raise ValueError(f"{name}: expected no gradient to be required (the op has no backward)")
    if can_look_at(k, v):
        for name, x in (("k", k), ("v", v)):
            if overlaps_itself(x):
                strides = list(x.stride())
                raise ValueError(f"{name}: expected a view without overlap, got {describe(x)}, strides {strides}")
        for name, x in (("v", v), ("store.k", store.k), ("store.v", store.v)):
            if shares_memory(k, x) or (x is not v and shares_memory(v, x)):
                raise ValueError(f"{name}: expected memory apart from the cache, got views that share elements")
    return dims["S"]


def refocus_(
    k: Tensor,
    v: Tensor,
    state: RefocusState,
    scores: Tensor,
    store: GistStore,
    counts: Tensor,
    pinned: Tensor,
    weights: Sequence[GistPoolWeights],
    rule: RefocusRule,
    *,
    lists: RefocusLists | None = None,
    backend: str | None = None,
) -> RefocusLists:
    """Refocus a Working Context: decide by scores which gists open and which groups of siblings close, and edit the
    cache, with no copy back to the host. With `lens_score` before it a decode step that refocuses can be captured in
    one CUDA graph; every replay decides anew.

    Candidates, of which each refocus changes none, some or all by one level:

    - A gist may open if its children are in the store and it does not rest. It is a candidate if its gain is worth more
      than `min_gain`. Others that would be are listed as wanted.
    - A complete group of K siblings may close if the tree has their parent, no pinned range meets it, none of them is a
      candidate to open, and it does not rest. It stays open while the budget has room; kept open it is worth the sum of
      its costs, a block of tokens being one leaf, and `hysteresis` beyond `min_gain`.

    The heaviest candidates that the budget has room for are open afterwards. That is what the numpy allocator
    (`mc_runtime.focus.allocator`) decides where nothing else may change, to the last bit of every weight: weights are
    fp64, of equal ones later text is opened. `mc_runtime.focus.one_level` states it in those terms; the formulas are in
    csrc/include/mc_kernels.h. Nodes that changed rest for `cooldown` cycles.

    Args:
        k, v: [L, Hkv, S, D], keys unrotated; fp32, bf16 or fp16; any strides with a contiguous last dimension; both may
            be views of one allocation. Written.
        state: the Working Context in this cache. Updated.
        scores: [S, 2] fp32 by slot, as `lens_score` returns them for entries by slot: nats gained by opening an entry,
            nats lost by closing its leaf; of a block of tokens its first token's counts. Clipped to +-1000, NaN is 0.
        store: keys and values of the children of gists.
        counts: [n_levels + 1] int64: tokens of history, then nodes of level 1, 2, ... in the tree.
        pinned: [P, 2] int64 token ranges (start, stop) that stay in their present detail; empty ranges pin nothing.
        weights: `gist_pool`'s for gists of level 1, 2, ..., one gist a block; the last serve the levels above too.
        rule: budget, thresholds, limits.
        lists: what has been done is written here; None: new ones, with room for as many wanted gists as slots.
        backend: `ref`, `cuda`, or None for the best that can. `ref` decides on the host.

    Returns: `lists`. How many of each, the new length and the cycle are in `state.numbers`, on the device.

    The tensors of state, store, counts, pinned and lists are contiguous and on k's device. What they hold is not
    checked. A group that closes becomes what `gist_pool` makes of its entries, an opened gist's children are copied
    from the store; the slots are those of `SplicePlan.from_edits(..., discipline="slots")` for the same edits. Entries
    whose keys and values the base model is to compute have their slots in `lists.inserted`. An empty context is legal.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride, value or aliasing.
        BackendError: the named backend cannot serve.

    All before anything is written. Not differentiable: with gradients enabled, tensors that require them are refused.
    """
    n_slots = _check_cache(k, v, store, weights, rule.block_size)
    if rule.budget > n_slots:
        raise ValueError(f"rule.budget: expected at most the {n_slots} slots of the cache, got {rule.budget}")
    if lists is None:
        lists = RefocusLists.allocate(n_slots, n_slots, k.device)
    i32, i64, f32 = torch.int32, torch.int64, torch.float32
    dims = {"S": n_slots}
    arrays: dict[str, tuple[Tensor, torch.dtype, tuple[str | int, ...]]] = {
        "state.levels": (state.levels, i32, ("S",)),
        "state.index": (state.index, i64, ("S",)),
        "state.slots": (state.slots, i64, ("S",)),
        "state.born": (state.born, i32, ("S",)),
        "state.pos": (state.pos, i64, ("S",)),
        "state.numbers": (state.numbers, i64, (8,)),
        "lists.edits": (lists.edits, i32, ("S", 3)),
        "lists.inserted": (lists.inserted, i32, ("S", 2)),
        "lists.moves": (lists.moves, i32, ("S", 2)),
        "lists.children": (lists.children, i32, ("S",)),
        "lists.wanted": (lists.wanted, i64, ("n_wanted",)),
        "store.keys": (store.keys, i64, ("T",)),
        "store.rows": (store.rows, i32, ("T",)),
        "scores": (scores, f32, ("S", 2)),
        "counts": (counts, i64, ("n_levels + 1",)),
        "pinned": (pinned, i64, ("P", 2)),
    }
    if state.bias is not None:
        arrays["state.bias"] = (state.bias, f32, ("S",))
    for name, (x, dtype, shape) in arrays.items():
        _check_array(name, x, dtype, shape, dims)
    if counts.shape[0] < 1:
        raise ValueError("counts: expected the number of tokens and of the nodes of each level, got nothing")
    given = {name: x for name, (x, _, _) in arrays.items()} | {f"weights[{i}]": w.w for i, w in enumerate(weights)}
    check_same_device(("k", k), **given, **{"v": v, "store.k": store.k, "store.v": store.v})
    _op(
        k, v, state.levels, state.index, state.slots, state.born, state.pos, state.bias, state.numbers, lists.edits,
        lists.inserted, lists.moves, lists.children, lists.wanted, store.k, store.v, store.keys, store.rows, scores,
        counts, pinned, [x for w in weights for x in w.tensors()], rule.block_size, rule.budget, rule.cooldown,
        -1 if rule.max_edits is None else rule.max_edits, rule.min_gain, rule.hysteresis, rule.gist_bias, backend,
    )  # fmt: skip
    if not torch.compiler.is_compiling() and not k.is_inference():
        torch.autograd.graph.increment_version((k, v))
    return lists
