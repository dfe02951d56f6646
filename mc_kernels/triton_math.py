# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Elementary functions to fp32 rounding. Triton's own are the processor's approximations of a rounded argument."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts; the first has few enough bits for its products with whole numbers to be exact.
_LN_2_HIGH, _LN_2_LOW = tl.constexpr(0.693145751953125), tl.constexpr(1.428606765330187e-06)
# exp(-104) is less than half of the smallest number.
_LEAST = tl.constexpr(-104.0)


@triton.jit
def exp_of_nonpositive(x):
    """exp(x) of fp32 x <= 0 or NaN, within one unit in the last place where the result is a normal number.

    `tl.exp(x)` is 2^(x log2 e) with a product that is rounded and a power that is approximated: an error of |x| and two
    more units. Here whole powers of two are taken off first (Cody and Waite 1980), and the rest, of at most ln 2 / 2,
    goes through the series: its first term left out is 5e-9 of the result.
    """
    x = tl.where(x < _LEAST, _LEAST, x)  # minus infinity too; NaN stays
    whole = tl.floor(x * _LOG2_E + 0.5)
    rest = tl.fma(whole, -_LN_2_LOW, tl.fma(whole, -_LN_2_HIGH, x))
    y = tl.fma(rest, 1 / 5040, 1 / 720)
    y = tl.fma(rest, y, 1 / 120)
    y = tl.fma(rest, y, 1 / 24)
    y = tl.fma(rest, y, 1 / 6)
    y = tl.fma(rest, y, 0.5)
    y = tl.fma(rest * rest, y, rest)
    return (1.0 + y) * tl.exp2(whole)
