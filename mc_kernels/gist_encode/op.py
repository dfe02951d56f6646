"""`gist_encode`: schema, checks, shape function, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import cuda_backend
from ..checks import (
    ORACLE_DTYPES,
    check_contiguous_rows,
    check_same_device,
    check_shape,
    check_tensor,
    describe,
)
from ..library import define_op, register_autograd
from ..triton_backend import power_of_two, refuse, register_triton
from . import cpu as cpu
from . import ref as ref
from .weights import SHAPES, GistEncodeWeights

_TENSORS = ", ".join(f"Tensor {name}" for name in ("blocks", *SHAPES))
_CONSTANTS = "int level, int n_heads, str pool, float rope_theta, float target_rms, str? backend"
_N_TENSORS = 1 + len(SHAPES)
_POOL_Q = 1 + list(SHAPES).index("pool_q")


def _fake(blocks: Tensor, *args: Any, **_: Any) -> Tensor:
    pool_q = args[_POOL_Q - 1]
    return blocks.new_empty(blocks.shape[0], pool_q.shape[0], blocks.shape[2])


def _fake_backward(grad: Tensor, *args: Any, **_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[:_N_TENSORS])


def _triton_refuses(blocks: Tensor, *args: Any) -> str | None:
    """Reason why the Triton version cannot take the op's arguments, or None. A window's scores are one tile, and its
    queries, keys and values of a head stay in registers."""
    named = dict(zip((*SHAPES, "level", "n_heads", "pool"), args, strict=False))
    rows = blocks.shape[1] + (named["pool"] == "cls")
    if rows > 128:
        return f"expected windows of at most 128 rows, a class token included, got {rows}"
    head = named["qkv"].shape[2] // named["n_heads"]
    if named["qkv"].shape[0] and power_of_two(rows) * power_of_two(head) > 128 * 64:
        return f"expected rows of a window times width of a head, as powers of two, up to 8192, got {rows} and {head}"
    return refuse(blocks, *args)


MOST_CUDA_HEAD = 128


def _cuda_refuses(blocks: Tensor, *args: Any) -> str | None:
    """Reason why the CUDA version cannot take the op's arguments, or None."""
    named = dict(zip((*SHAPES, "level", "n_heads", "pool"), args, strict=False))
    head = named["qkv"].shape[2] // named["n_heads"]
    if head > MOST_CUDA_HEAD:
        return f"expected heads of at most {MOST_CUDA_HEAD}, got {head}"
    return cuda_backend.refuse(blocks, *args)


_op = define_op("gist_encode", f"({_TENSORS}, {_CONSTANTS}) -> Tensor", _fake)
_op_backward = define_op(
    "gist_encode_backward",
    f"(Tensor grad, {_TENSORS}, {_CONSTANTS}) -> ({', '.join(['Tensor'] * _N_TENSORS)})",
    _fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_N_TENSORS])
    ctx.constants = inputs[_N_TENSORS:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _op_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return (*grads, *(None for _ in ctx.constants))


register_autograd("gist_encode", _backward, _setup_context)


register_triton("gist_encode", "mc_kernels.gist_encode.triton_kernel", "gist_encode_triton", _triton_refuses)
register_triton(
    "gist_encode_backward", "mc_kernels.gist_encode.triton_backward", "gist_encode_backward_triton",
    lambda grad, *args: _triton_refuses(*args),
)  # fmt: skip

cuda_backend.register_cuda("gist_encode", "mc_kernels.gist_encode.cuda", "gist_encode_cuda", _cuda_refuses)
cuda_backend.register_backward("gist_encode_backward")


def gist_encode(blocks: Tensor, weights: GistEncodeWeights, *, level: int = 1, backend: str | None = None) -> Tensor:
    """Compress every window of K embeddings (or gists) into G gists in the base model's embedding space.

    Args:
        blocks: [N, K, E] input embeddings of tokens (level 1) or gists of the level below (level >= 2), raw, not
            normalised; fp32, bf16 or fp16; any strides with a contiguous last dimension; K <= weights.max_block_size.
        weights: its E is that of blocks. Its dtype may differ from blocks'.
        level: of the gists produced, >= 1. Selects the level embedding (the last one beyond n_levels) and says what the
            inputs are: tokens are centred by `weights.mu`; gists already are, so at level >= 2 `mu` is not taken off
            again.
        backend: `ref`, `cpu`, `triton`, `cuda`, or None for the best that can.

    Returns:
        gists [N, G, E] in blocks' dtype, RMS gain * target_rms, contiguous, aliasing nothing. With untrained weights:
        the centred mean of the block at RMS target_rms. N = 0 gives an empty output; a block whose centred mean is zero
        gives finite numbers.

    Raises:
        TypeError: dtype or device.
        ValueError: shape, stride or value.
        BackendError: the named backend cannot serve.

    Gradients flow to blocks and every tensor of the weights (once: no second derivative). The formula is in `ref`.
    Source: gisting (Mu et al. 2023) and In-context Autoencoder (Ge et al. 2024) for the idea; `ref` names the layers'.
    """
    if not isinstance(weights, GistEncodeWeights):
        raise TypeError(f"weights: expected GistEncodeWeights, got {describe(weights)}")
    check_tensor("blocks", blocks, ORACLE_DTYPES)
    check_shape("blocks", blocks, ("N", "K", "E"), {"E": weights.embed_dim})
    k = blocks.shape[1]
    if not 1 <= k <= weights.max_block_size:
        raise ValueError(f"blocks: expected 1 <= K <= {weights.max_block_size} (max_block_size), got K={k}")
    if not isinstance(level, int) or isinstance(level, bool):
        raise TypeError(f"level: expected an int, got {describe(level)}")
    if level < 1:
        raise ValueError(f"level: expected at least 1, got {level}")
    check_same_device(("blocks", blocks), weights=weights.mu)
    check_contiguous_rows("blocks", blocks)
    return _op(
        blocks,
        *weights.tensors(),
        level,
        weights.n_heads,
        weights.pool,
        weights.rope_theta,
        weights.target_rms,
        backend,
    )
