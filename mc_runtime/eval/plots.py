"""Pictures of evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from .substitutability import Comparison

OURS, RIVAL, BEST, INK, FAINT = "#c2477f", "#9aa3b5", "#4a5570", "#1b2233", "#d9dde6"


def draw_substitutability(comparisons: Sequence[Comparison], path: Path, title: str) -> Path:
    """Recovery of every arm as bars with 95% intervals; a row of panels per ratio, a panel per text.

    Arms of a row stand in one order: by their mean over the texts. The best rivals are darker.
    """
    texts = list(dict.fromkeys(c.text for c in comparisons))
    ratios = list(dict.fromkeys(c.ratio for c in comparisons))
    by_place = {(c.ratio, c.text): c for c in comparisons}
    arms = max(len(c.arms) - 2 for c in comparisons)
    figure, axes = plt.subplots(
        len(ratios), len(texts), squeeze=False, sharex="row", layout="constrained",
        figsize=(3.2 + 3.1 * len(texts), 0.9 + len(ratios) * (0.7 + 0.24 * arms)),
    )  # fmt: skip
    for row, ratio in zip(axes, ratios, strict=True):
        found = [by_place[ratio, text] for text in texts if (ratio, text) in by_place]
        mean: dict[str, list[float]] = {}
        for c in found:
            for arm in (a for a in c.arms if a.kind != "bound"):
                mean.setdefault(arm.name, []).append(c.recovery(arm).value)
        order = sorted(mean, key=lambda name: sum(mean[name]) / len(mean[name]))
        for axis, text in zip(row, texts, strict=True):
            if (ratio, text) in by_place:
                _panel(axis, by_place[ratio, text], order)
            axis.set_title(f"{text}, {ratio}:1", fontsize=9, color=INK, loc="left")
        for axis in row[1:]:
            axis.set_yticklabels([])
        # A rival far below nothing must not flatten the others.
        low, high = row[0].get_xlim()
        row[0].set_xlim(max(low, -0.55), min(high, 1.1))
    for axis in axes[-1]:
        axis.set_xlabel("recovery (0: recent window, 1: full context)", fontsize=8, color=INK)
    axes[-1][0].annotate(
        "† chooses anew as the text goes on", (0, 0), (0, -34), xycoords="axes fraction", textcoords="offset points",
        fontsize=7, color=INK, annotation_clip=False,
    )  # fmt: skip
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _panel(axis: plt.Axes, comparison: Comparison, order: Sequence[str]) -> None:
    names = [arm.name for arm in comparison.arms]
    for place, name in enumerate(order):
        if name not in names:
            continue
        arm = comparison[name]
        e = comparison.recovery(arm)
        colour = OURS if arm.kind == "ours" else BEST if arm in comparison.best_rivals else RIVAL
        axis.barh(place, e.value, color=colour, height=0.7)
        axis.plot((e.low, e.high), (place, place), color=INK, linewidth=1.1)
    anew = {arm.name for arm in comparison.arms if arm.anew}
    labels = [f"{name} †" if name in anew else name for name in order]
    axis.set_yticks(range(len(order)), labels, fontsize=8, color=INK)
    axis.axvline(0, color=INK, linewidth=0.8)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelsize=8, colors=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
