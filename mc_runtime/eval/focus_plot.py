"""A picture of `mc eval focus`: what each choice of blocks gains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .focus import ORACLE, FocusResult
from .focus_report import gain
from .plots import BEST, FAINT, INK, OURS, RIVAL
from .selectors import ByHindsight, ByLensNet

COLOURS = {ORACLE: BEST, ByLensNet.name: OURS, ByHindsight.name: OURS}


def draw_focus(results: Sequence[FocusResult], path: Path, title: str) -> Path:
    """Nats per token that opening the chosen blocks gains, as bars with 95% intervals; a panel per text."""
    figure, axes = plt.subplots(
        1, len(results), squeeze=False, layout="constrained", figsize=(2.2 + 2.4 * len(results), 2.8)
    )
    for axis, result in zip(axes[0], results, strict=True):
        selectors = list(reversed(result.found))
        for place, name in enumerate(selectors):
            estimate = gain(result, name)
            axis.barh(place, estimate.value, color=COLOURS.get(name, RIVAL), height=0.7)
            axis.plot((estimate.low, estimate.high), (place, place), color=INK, linewidth=1.1)
        labels = selectors if axis is axes[0][0] else [""] * len(selectors)
        axis.set_yticks(range(len(selectors)), labels, fontsize=8, color=INK)
        axis.set_title(result.text, fontsize=9, color=INK, loc="left")
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8, colors=INK)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0][0].set_xlabel("gain over gists alone, nats per token", fontsize=8, color=INK)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path
