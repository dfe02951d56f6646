"""Intervals: bootstrap over documents' windows for means and ratios, Wilson for shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def text(self, digits: int = 2) -> str:
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def bootstrap(figure: Callable[..., float], *columns: NDArray[np.float64], seed: int = 0) -> Estimate:
    """figure(*columns) with a percentile interval over resampled rows (the same rows of every column: paired)."""
    n = _rows(columns)
    rng = np.random.default_rng(seed)
    drawn = [figure(*(c[rows] for c in columns)) for rows in rng.integers(0, n, (RESAMPLES, n))]
    return _percentiles(float(figure(*columns)), np.array(drawn), n)


def bootstrap_of_means(figure: Callable[..., Any], *columns: NDArray[np.float64], seed: int = 0) -> Estimate:
    """`bootstrap` of a figure that is a function of the columns' means, at a hundredth of its cost.

    figure: takes one mean per column, as a float or, elementwise, as an array of them.
    """
    n = _rows(columns)
    draws = _draws(n, seed)
    return _percentiles(float(figure(*(c.mean() for c in columns))), figure(*(draws @ c for c in columns)), n)


@lru_cache(maxsize=8)
def _draws(n: int, seed: int) -> NDArray[np.float64]:
    """[RESAMPLES, n] share of each row in each resample; the resamples are those of `bootstrap`."""
    rows = np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    return np.stack([np.bincount(r, minlength=n) for r in rows]) / n


def _rows(columns: tuple[NDArray[np.float64], ...]) -> int:
    n = len(columns[0])
    if n == 0:
        raise ValueError("columns: expected at least one row, got none")
    return n


def _percentiles(value: float, drawn: NDArray[np.float64], n: int) -> Estimate:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(value, float(low), float(high), n)


def wilson(hits: int, n: int) -> Estimate:
    """Share of hits with Wilson's score interval (Wilson 1927)."""
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"hits: expected 0 to n of at least one trial, got {hits} of {n}")
    p, z2 = hits / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return Estimate(p, max(0.0, centre - half), min(1.0, centre + half), n)


def recovery(window: NDArray[np.float64], full: NDArray[np.float64], arm: NDArray[np.float64]) -> float:
    """(NLL_window - NLL_arm) / (NLL_window - NLL_full), of means over rows."""
    return float(recovery_of_means(window.mean(), full.mean(), arm.mean()))


def recovery_of_means(window: Any, full: Any, arm: Any) -> Any:
    """`recovery` from means, for floats or arrays of them."""
    return (window - arm) / (window - full)
