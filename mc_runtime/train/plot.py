"""A picture of a training run, drawn from its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

RAW, LINE, INK = "#c9cfdb", "#c2477f", "#1b2233"
# Steps over which the smoothed line averages, about.
SPAN = 20


def smoothed(values: Sequence[float], span: float = SPAN) -> list[float]:
    """Exponential moving average of the values so far, without the bias of its start."""
    decay, total, weight, out = 1.0 - 1.0 / span, 0.0, 0.0, []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1.0
        out.append(total / weight)
    return out


def draw_losses(log: Path, path: Path, title: str = "") -> Path:
    """Loss, and NLL where the log has it, over the steps: each step's value faint, the moving average over it."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    figures = [name for name in ("loss", "nll") if any(name in line for line in lines)]
    figure, axes = plt.subplots(
        1, max(1, len(figures)), squeeze=False, figsize=(5.0 * max(1, len(figures)), 3.4), layout="constrained"
    )
    for axis, name in zip(axes[0], figures, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        steps, values = [p[0] for p in points], [p[1] for p in points]
        axis.plot(steps, values, color=RAW, linewidth=0.8)
        axis.plot(steps, smoothed(values), color=LINE, linewidth=1.8)
        axis.set_xlabel("step", color=INK)
        axis.set_ylabel(f"{name}, nats per token" if name == "nll" else name, color=INK)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
