"""The picture of a focus map."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from .focus_map import FocusMap

# Coarse to fine: night, dusk, ember, light. Detail glows.
COLOURS = ["#0b1026", "#1d2b5c", "#4b3f8f", "#b14d82", "#ffd166"]
BACKGROUND, INK = "#070a18", "#e8e6f0"
COLUMNS = 1600


def draw_focus_map(focus_map: FocusMap, path: Path, title: str) -> Path:
    """Write a PNG: history from left to right, turns from top to bottom, level of detail as colour."""
    frames = focus_map.frames
    span = max(frame.length for frame in frames)
    grid = np.stack([frame.levels(COLUMNS, span) for frame in frames])
    coarsest = min(int(np.nanmax(grid)), len(COLOURS) - 1)
    shades = COLOURS[-(coarsest + 1) :]
    detail = coarsest - np.minimum(grid, coarsest)
    # A glow around what is sharp, or a few blocks of 32 in 100,000 tokens would be thinner than a pixel.
    sharp = np.nan_to_num(grid, nan=9) == 0
    for shift in (-2, -1, 1, 2):
        detail = np.where(np.roll(sharp, shift, axis=1) & ~np.isnan(grid), coarsest, detail)

    height = 1.6 + 0.62 * len(frames)
    figure, axis = plt.subplots(figsize=(14, height), facecolor=BACKGROUND)
    axis.set_facecolor(BACKGROUND)
    axis.imshow(
        np.ma.masked_invalid(np.repeat(detail, 2, axis=0)),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(shades),
        vmin=-0.5,
        vmax=len(shades) - 0.5,
        extent=(0, span, len(frames), 0),
    )
    for row in range(1, len(frames)):
        axis.axhline(row, color=BACKGROUND, linewidth=5)
    axis.set_yticks(np.arange(len(frames)) + 0.5)
    axis.set_yticklabels([textwrap.fill(frame.label, 46) for frame in frames], color=INK, fontsize=9)
    axis.tick_params(colors=INK, length=0)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if span > 5000 else f"{x:,.0f}")
    axis.set_xlabel("history (tokens)", color=INK)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for frame, row in zip(frames, range(len(frames)), strict=True):
        per_level = frame.entries.per_level()
        text = f"{len(frame.entries):,} slots for {frame.length:,} tokens, {per_level.get(0, 0):,} of them in full"
        axis.text(span * 1.006, row + 0.5, textwrap.fill(text, 24), color=INK, fontsize=8, va="center")
    names = ["tokens", "gists of 32", "gists of 1,024", "gists of 32,768", "coarser"]
    size = frames[0].entries.block_size
    if size != 32:
        names = ["tokens"] + [f"gists of {size**level:,}" for level in range(1, 4)] + ["coarser"]
    legend = [Patch(color=shades[coarsest - level], label=names[level]) for level in range(len(shades))]
    axis.legend(
        handles=legend, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=len(legend), frameon=False,
        labelcolor=INK, fontsize=9,
    )  # fmt: skip
    axis.set_title(title, color=INK, fontsize=14, loc="right", pad=14)
    figure.savefig(path, dpi=140, bbox_inches="tight", facecolor=BACKGROUND)
    plt.close(figure)
    return path
