"""A loss's gradient against what the loss does when its parameters move."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch

from mc_runtime.train.gist_task import GistTask


def assert_gradient_is_slope(task: GistTask, names: Iterable[str], seed: int = 5, step: float = 1e-3) -> None:
    """Of each named parameter, whose gradient has been computed with samples of `seed`: along a random direction the
    loss of the same samples changes as the gradient says."""
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        p = task.parameters[name]
        direction = torch.randn(p.shape, generator=generator)
        assert p.grad is not None, name
        ends = []
        for signed in (step, -step):
            p.data += signed * direction
            ends.append(float(task.loss(random.Random(seed))[0].detach()))
            p.data -= signed * direction
        slope = float((p.grad * direction).sum())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.05, abs=1e-3), name
