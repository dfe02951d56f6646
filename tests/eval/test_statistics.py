"""Intervals against what is known of them."""

from __future__ import annotations

import numpy as np
import pytest

from mc_runtime.eval.statistics import bootstrap, bootstrap_of_means, recovery, recovery_of_means, wilson


def test_wilson() -> None:
    """Figures of the score interval as statistics packages give them."""
    half = wilson(5, 10)
    assert (half.value, half.n) == (0.5, 10)
    assert half.low == pytest.approx(0.2366, abs=1e-4)
    assert half.high == pytest.approx(0.7634, abs=1e-4)
    none = wilson(0, 20)
    assert none.low == pytest.approx(0.0, abs=1e-12)
    assert none.high == pytest.approx(0.1611, abs=1e-4)
    for hits, n in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="hits"):
            wilson(hits, n)


def test_bootstrap_covers_the_mean() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        x = rng.normal(3.0, 1.0, 80)
        estimate = bootstrap(lambda a: float(a.mean()), x, seed=seed)
        assert estimate.low < estimate.value < estimate.high
        assert estimate.value == pytest.approx(x.mean())
        inside += estimate.low < 3.0 < estimate.high
    assert inside >= 50
    with pytest.raises(ValueError, match="row"):
        bootstrap(lambda a: float(a.mean()), np.zeros(0))


def test_recovery_is_paired() -> None:
    """Windows differ far more among each other than arms do: the interval sees only the arms."""
    rng = np.random.default_rng(1)
    window = rng.normal(3.0, 2.0, 50)
    full = window - 0.5
    arm = window - 0.2
    estimate = bootstrap(recovery, window, full, arm)
    assert estimate.value == pytest.approx(0.4)
    assert estimate.high - estimate.low < 1e-9


def test_bootstrap_of_means_is_the_bootstrap() -> None:
    rng = np.random.default_rng(2)
    window, full, arm = rng.normal(3.0, 0.2, 40), rng.normal(2.0, 0.2, 40), rng.normal(2.5, 0.2, 40)
    for seed in (0, 5):
        slow = bootstrap(recovery, window, full, arm, seed=seed)
        fast = bootstrap_of_means(recovery_of_means, window, full, arm, seed=seed)
        assert (fast.value, fast.n) == (pytest.approx(slow.value), 40)
        assert fast.low == pytest.approx(slow.low)
        assert fast.high == pytest.approx(slow.high)
    with pytest.raises(ValueError, match="row"):
        bootstrap_of_means(np.negative, np.zeros(0))
