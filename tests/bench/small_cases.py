"""Small cases and wrong kernels for the tests of the harness."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from mc_kernels.context_attention.cases import Case as AttentionCase
from mc_kernels.fused_linear.cases import Case as LinearCase
from mc_kernels.gist_encode.cases import Case as EncodeCase
from mc_kernels.gist_pool.cases import Case as PoolCase
from mc_kernels.gist_pool.collapse_cases import Case as CollapseCase
from mc_kernels.kv_splice.cases import Case as SpliceCase
from mc_kernels.lens_score.cases import Case as ScoreCase
from mc_kernels.refocus.timed_cases import Case as RefocusCase
from mc_kernels.registry import IMPLS, Impl

TINY: dict[str, Any] = {
    "kv_splice_": SpliceCase("tiny/ordered-rope", 3, 2, 16, 90, 2, "mixed", span=8),
    "context_attention": AttentionCase("tiny/decode", 6, 2, 16, 70, 1),
    "fused_linear": LinearCase("tiny/linear", 2, 64, 96, norm=True, swiglu=True, residual=True),
    "gist_pool": PoolCase("tiny/pool", 3, 1, 2, 2, 32, 16),
    "collapse_": CollapseCase("tiny/collapse", 3, 2, 16, 90, 2, block_size=8),
    "gist_encode": EncodeCase("tiny/encode", 2, 32, 48, 32, 2, 4, 56),
    "lens_score": ScoreCase("tiny/score", 50, 40, 5, 6, 32, 4, 1, 24, 4, 4, 16),
    "refocus_": RefocusCase("tiny/refocus", 3, 2, 16, 10, 6, 1, 2, block_size=8),
}
OTHERS: dict[str, Any] = {
    "kv_splice_ unrotated": SpliceCase("tiny/ordered", 3, 2, 16, 90, 1, "expand", rope=False, span=8),
    "kv_splice_ slots": SpliceCase("tiny/slots", 3, 2, 16, 90, 1, "collapse", "slots", rope=False, span=8),
    "context_attention prefill": AttentionCase("tiny/prefill", 6, 2, 16, 70, 20),
}


def outputs(op: str, args: tuple[Any, ...], out: Any) -> Tensor:
    """The tensor that a kernel of `op` has to get right; of the first and the last row in a cache."""
    if op in ("kv_splice_", "collapse_", "refocus_"):
        return args[0]
    return out if isinstance(out, Tensor) else out[0]


def install(
    monkeypatch: pytest.MonkeyPatch, op: str, fn: Callable[..., Any], backend: str = "cpu", **options: Any
) -> None:
    """Register `fn` as the backend of `op` for the length of a test."""
    monkeypatch.setitem(IMPLS[op], backend, Impl(op, backend, fn, **options))


def spoilt(op: str, spoil: Callable[[Tensor], object]) -> Callable[..., Any]:
    """The reference with its result changed in place by `spoil`."""
    reference = IMPLS[op]["ref"].fn

    def wrong(*args: Any) -> Any:
        out = reference(*args)
        spoil(outputs(op, args, out))
        return out

    return wrong


def slowed(op: str, seconds: Callable[[], float]) -> Callable[..., Any]:
    """The reference after a sleep."""
    reference = IMPLS[op]["ref"].fn

    def slow(*args: Any) -> Any:
        time.sleep(seconds())
        return reference(*args)

    return slow
