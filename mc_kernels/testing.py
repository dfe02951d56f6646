"""What every kernel test uses: poisoned memory, guard bytes, and the error rule.

The error rule (after flash-attention): against an fp64 (or fp32) oracle an implementation may err at most twice as
much as the same computation in plain PyTorch at the same precision, plus one rounding of the output dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

GUARD_BYTE = 0xA5
_deterministic: Any = torch.utils.deterministic  # its attribute is a property that mypy does not see


def poison_(x: Tensor) -> Tensor:
    """Fill with NaN (floating point) or the dtype's minimum (integers): nothing unwritten can look right."""
    return x.fill_(float("nan")) if x.dtype.is_floating_point else x.fill_(torch.iinfo(x.dtype).min)


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within this context every freshly allocated uninitialised tensor holds NaN (integers: their maximum).

    Torch itself fills them, below the dispatcher, so it also reaches allocations inside an op's implementation (a
    dispatch mode is off there). Side effect: deterministic algorithms, with a warning where there are none.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    _deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _deterministic.fill_uninitialized_memory = filling


class Guarded:
    """A tensor inside a larger buffer whose other bytes carry a pattern: `check()` fails if any of them changed."""

    def __init__(self, source: Tensor, *, margin: int = 64, gap: int = 0) -> None:
        """Copy `source` into guarded memory. `gap`: extra elements between rows of the last dimension, so that the
        view is strided with a contiguous last dimension."""
        if source.dim() == 0:
            raise ValueError("source: expected at least one dimension, got a scalar")
        row = source.shape[-1] + gap
        rows = source.numel() // source.shape[-1] if source.shape[-1] else 0
        size = source.element_size()
        self.bytes = torch.full(((rows * row + 2 * margin) * size,), GUARD_BYTE, dtype=torch.uint8)
        flat = self.bytes.view(source.dtype)
        strides = [0] * source.dim()
        step = row
        strides[-1] = 1
        for d in range(source.dim() - 2, -1, -1):
            strides[d] = step
            step *= max(source.shape[d], 1)
        self.view = flat.as_strided(source.shape, strides, margin)
        inside = torch.zeros(flat.shape, dtype=torch.bool)
        inside.as_strided(source.shape, strides, margin).fill_(True)
        self._outside = ~inside.repeat_interleave(size)
        self.view.copy_(source)

    def check(self) -> None:
        bad = (self.bytes != GUARD_BYTE) & self._outside
        if bad.any():
            where = bad.nonzero()[0].item()
            raise AssertionError(f"guard byte {where} of {self.bytes.numel()} was overwritten")


def max_error(x: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite unless the oracle is NaN at the same place."""
    if x.numel() == 0:
        return 0.0
    a, b = x.detach().double().cpu(), oracle.detach().double().cpu()
    same = (a == b) | (a.isnan() & b.isnan())
    diff = torch.where(same, torch.zeros_like(a), (a - b).abs())
    return float(torch.nan_to_num(diff, nan=float("inf"), posinf=float("inf")).max())


def assert_within_error_rule(out: Tensor, oracle: Tensor, plain: Tensor, *, what: str = "output") -> None:
    """|out - oracle| <= 2 |plain - oracle| + one rounding, in the maximum norm.

    oracle: high-precision result; plain: the same computation in plain PyTorch at the precision of `out`. A `plain`
    that is not finite where the oracle is would allow any error and is refused.
    """
    for name, x in (("oracle", oracle), ("plain", plain)):
        if out.shape != x.shape:
            raise AssertionError(f"{what}: shape {list(out.shape)}, {name} {list(x.shape)}")
    rival = max_error(plain, oracle)
    if not math.isfinite(rival):
        raise AssertionError(f"{what}: plain PyTorch gives no finite result here; choose inputs that it can take")
    finite = oracle[oracle.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    rounding = torch.finfo(out.dtype).eps * scale
    got, allowed = max_error(out, oracle), 2 * rival + rounding
    if not got <= allowed:
        raise AssertionError(f"{what}: error {got:.3e} exceeds the rule's {allowed:.3e} (plain PyTorch, one rounding)")
