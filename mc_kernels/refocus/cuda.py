"""`refocus_` on a GPU by csrc/refocus/cuda.cu, two launches; see kernel.cuh there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .. import cuda_backend, native

_NAMES = (
    "levels", "index", "slots", "born", "pos", "bias", "state", "edits", "inserted", "moves", "children", "wanted",
    "store_keys", "store_rows", "scores", "counts", "pinned",
)  # fmt: skip


def _call(k: Tensor, v: Tensor, *rest: Any) -> Callable[[Any], int]:
    """The library's call but for its last argument; keeps what it reads."""
    arrays, stores = [*rest[:12], *rest[14:19]], rest[12:14]
    named = dict(zip(_NAMES, arrays, strict=True))
    weights: Sequence[Tensor] = [x if x.stride(-1) == 1 else x.contiguous() for x in rest[19]]
    views = [native.view(x) for x in weights]
    arguments = (
        *(native.view(x) for x in (k, v, *stores)),
        [tuple(views[i : i + 4]) for i in range(0, len(views), 4)],
        {name: native.address(x) for name, x in named.items()},
        named["counts"].shape[0] - 1,
        named["pinned"].shape[0],
        named["store_keys"].shape[0],
        named["wanted"].shape[0],
        *rest[20:],
    )

    def call(where: Any, held: object = (k, v, arrays, stores, weights)) -> int:
        return int(cuda_backend.library().refocus(*arguments, where))

    return call


def refocus_workspace(*args: Any) -> int:
    """Bytes of workspace that a call with these arguments needs; they depend on shapes alone."""
    return cuda_backend.workspace_bytes(_call(*args), args[0])


def refocus_cuda(*args: Any, workspace: Tensor | None = None) -> None:
    """See `op.py` for the flat arguments, in the order of its schema. On the current stream; nothing is copied to the
    host and nothing waits, so that the call can be captured in a CUDA graph, and each replay decides anew.

    workspace: uint8 on k's device, `refocus_workspace(...)` bytes. With it, and with weights whose last dimension is
        contiguous, nothing is allocated.
    """
    kind = "refocus", tuple(x.shape for x in args if isinstance(x, Tensor)), args[0].dtype, args[22:], args[0].device
    cuda_backend.launch(_call(*args), args[0], workspace, kind)
