"""`gist_encode` on a GPU by csrc/gist_encode/cuda.cu (kernel.cuh there): few windows in one launch, many by
groups that stay in shared memory or by tiles. Forward only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import cuda_backend, native
from ..weight_shapes import POOLS
from .weights import SHAPES


def _call(blocks: Tensor, args: tuple[Any, ...], out: Tensor) -> Callable[[Any], int]:
    """The library's call but for its last argument; keeps what it reads."""
    *weights, level, n_heads, pool, rope_theta, target_rms = args
    held = [x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous() for x in weights]
    views = [native.view(x) for x in held]
    constants = (n_heads, POOLS.index(pool), rope_theta, target_rms)

    def call(where: Any, held: object = (held, blocks, out)) -> int:
        library = cuda_backend.library()
        return int(library.gist_encode(views, *constants, native.view(blocks), native.view(out), level, where))

    return call


def _empty(blocks: Tensor, args: tuple[Any, ...]) -> Tensor:
    pool_q = args[list(SHAPES).index("pool_q")]
    return blocks.new_empty(blocks.shape[0], pool_q.shape[0], blocks.shape[2])


def gist_encode_workspace(blocks: Tensor, *args: Any) -> int:
    """Bytes of workspace that a call with these arguments needs."""
    return cuda_backend.workspace_bytes(_call(blocks, args, _empty(blocks, args)), blocks)


def gist_encode_cuda(blocks: Tensor, *args: Any, out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
    """The op's flat arguments (tensors in the order of its schema, level, n_heads, pool, rope_theta, target_rms); see
    `ref.gist_encode_ref`. Any number of windows. A window's gists do not depend on the others of the call; their last
    bits may depend on how many there are, which decides how they are computed.

    out: [N, G, E] in blocks' dtype, its last dimension contiguous, apart from all that is read. workspace: uint8 on
        blocks' device, `gist_encode_workspace(...)` bytes. With both, and weights whose last dimension is contiguous,
        nothing is allocated: the call can be captured in a CUDA graph.
    """
    if out is None:
        out = _empty(blocks, args)
    elif out.device != blocks.device:
        raise ValueError(f"out: expected a tensor on {blocks.device}, got one on {out.device}")
    kind = "gist_encode", blocks.shape, out.shape, blocks.dtype, args[-5:-2], blocks.device  # level, n_heads, pool
    cuda_backend.launch(_call(blocks, args, out), blocks, workspace, kind)
    return out
