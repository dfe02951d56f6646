"""`collapse_`: schema, checks, shape function. In place, no autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import (
    INDEX_DTYPES,
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
from ..library import define_op
from ..memory import overlaps_itself, shares_memory
from ..triton_backend import register_triton
from . import collapse_ref as collapse_ref
from . import cpu as cpu
from .triton_tiling import supports as triton_supports
from .weights import GistPoolWeights

_SCHEMA = (
    "(Tensor(a!) k, Tensor(b!) v, Tensor w, Tensor b, Tensor m, Tensor c, Tensor children, Tensor slots, Tensor moves,"
    " str? backend) -> ()"
)


def _fake(*_: object) -> None:
    return None


_op = define_op("collapse_", _SCHEMA, _fake)
register_triton(
    "collapse_",
    "mc_kernels.gist_pool.collapse_triton",
    "collapse_triton",
    lambda *args: triton_supports(*args[:6]),  # slots and moves are on the CPU
)
register_cuda("collapse_", "mc_kernels.gist_pool.cuda", "collapse_cuda", lambda *args: refuse(*args[:6]))


def _check_cache(k: Tensor, v: Tensor, weights: GistPoolWeights) -> tuple[Tensor, Tensor]:
    """k and v as [L, B, Hkv, S, D]."""
    check_tensor("k", k, ORACLE_DTYPES)
    check_tensor("v", v, ORACLE_DTYPES)
    shape = ("R", "Hkv", "S", "D") if k.dim() == 4 else (weights.layers, "B", "Hkv", "S", "D")
    dims = {"Hkv": weights.kv_heads, "D": weights.head_dim}
    check_shape("k", k, shape, dims)
    check_shape("v", v, shape, dims)
    check_same_dtype(("k", k), v=v)
    check_same_device(("k", k), v=v, weights=weights.w)
    for name, x in (("k", k), ("v", v)):
        check_contiguous_rows(name, x)
    if torch.is_grad_enabled():
        for name, x in (("k", k), ("v", v), *(("weights", x) for x in weights.tensors())):
            if x.requires_grad:
                raise ValueError(f"{name}: expected no gradient to be required (the op has no backward)")
    if can_look_at(k, v):
        for name, x in (("k", k), ("v", v)):
            if overlaps_itself(x):
                strides = list(x.stride())
                raise ValueError(f"{name}: expected a view without overlap, got {describe(x)}, strides {strides}")
        if shares_memory(k, v):
            raise ValueError("v: expected memory apart from k, got views that share elements")
    if k.dim() == 5:
        return k, v
    if dims["R"] % weights.layers:
        raise ValueError(f"k: expected R that is a multiple of the weights' L={weights.layers}, got R={dims['R']}")
    split = (weights.layers, dims["R"] // weights.layers)
    return k.unflatten(0, split), v.unflatten(0, split)


def _check_slots(name: str, given: Tensor, shape: tuple[str, int], dims: dict[str, int], n_slots: int) -> Tensor:
    check_tensor(name, given, INDEX_DTYPES)
    check_shape(name, given, shape, dims)
    given = given.to("cpu", torch.int64)
    if given.numel() and can_look_at(given):
        low, high = (int(x) for x in given.aminmax())
        if low < 0 or high >= n_slots:
            raise ValueError(f"{name}: expected slots in 0..{n_slots - 1}, got {low}..{high}")
    return given


def _check_moves(moves: Tensor | None, n_slots: int) -> Tensor:
    if moves is None:
        return torch.empty((0, 3), dtype=torch.int64, device="cpu")
    check_tensor("moves", moves, INDEX_DTYPES)
    check_shape("moves", moves, (None, 3), {})
    moves = moves.to("cpu", torch.int64)
    if can_look_at(moves):
        for i, (source, destination, count) in enumerate(moves.tolist()):
            if min(source, destination, count) < 0 or max(source, destination) + count > n_slots:
                raise ValueError(
                    f"moves[{i}]: expected slots within {n_slots}, got {source} to {destination}, {count} of them"
                )
    return moves


def collapse_(
    k: Tensor,
    v: Tensor,
    weights: GistPoolWeights,
    children: Tensor,
    slots: Tensor,
    *,
    moves: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Collapse blocks of a KV cache in place: pool K entries into G gists and write these where entries were freed, in
    one call for all layers, sequences and KV heads.

    Args:
        k, v: [L, B, Hkv, S, D] or [R, Hkv, S, D] (R = L x batch, layer-major), keys unrotated; fp32, bf16 or fp16; any
            strides with a contiguous last dimension; both may be views of one allocation. Written. All sequences are
            edited alike: where they differ, call with views `k[:, i : i + 1]`.
        weights: of the level of the gists; its dtype may differ from k's.
        children: [n, K] int64, slots of each block's entries in timeline order.
        slots: [n, G] int64, the slot that each gist is written to; each once. Children's own slots will do, those of
            other blocks too: all blocks are pooled before anything is written.
        moves: [s, 3] int64 (source, destination, count), entries that fill what was freed: executed one after the
            other after the pooling and before the gists are written. None: the other slots of the children are left
            as they are, free to be used.
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can.

    With a plan of the slots discipline whose edits all replace K entries by G,

        collapse_(k, v, weights, plan.removed_slots.view(-1, K), plan.insert_slots.view(-1, G), moves=plan.segments)

    leaves the cache as `kv_splice_(k, v, k_gist, v_gist, plan)` does with what `gist_pool` makes of the entries.

    Empty children, batches and layers are legal. Slots that are not named are neither read nor written.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride, slot or aliasing.
        BackendError: the named backend cannot serve.

    All before anything is written. Under `torch.compile` what needs values or addresses is not checked.

    Not differentiable: with gradients enabled, tensors that require them are refused.
    """
    if not isinstance(weights, GistPoolWeights):
        raise TypeError(f"weights: expected GistPoolWeights, got {describe(weights)}")
    kk, vv = _check_cache(k, v, weights)
    n_slots = kk.shape[3]
    dims: dict[str, int] = {}
    children = _check_slots("children", children, ("n", weights.block_size), dims, n_slots)
    slots = _check_slots("slots", slots, ("n", weights.n_gists), dims, n_slots)
    if can_look_at(slots) and len(set(flat := slots.flatten().tolist())) < len(flat):
        twice = next(x for i, x in enumerate(flat) if x in flat[:i])
        raise ValueError(f"slots: expected each slot once, got {twice} twice")
    moves = _check_moves(moves, n_slots)
    _op(kk, vv, *weights.tensors(), children, slots, moves, backend)
    if not torch.compiler.is_compiling() and not k.is_inference():
        torch.autograd.graph.increment_version((k, v))
