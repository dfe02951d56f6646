"""Roofline (Williams, Waterman and Patterson 2009): what each op achieves against what the machine allows.

x is arithmetic intensity: an op's least FLOPs over its least bytes, from its `cases.py`. The sloped roofs are the
measured bandwidths, the flat ones torch's measured matrix rates. Rows without FLOPs (a splice that rotates nothing)
have no intensity and are shown below by bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from ..rows import Report, Row

# Okabe and Ito's palette: told apart by the colour-blind too.
COLOURS = {
    "kv_splice": "#D55E00", "context_attention": "#0072B2", "gist_pool": "#009E73", "gist_encode": "#CC79A7",
    "lens_score": "#E69F00", "collapse": "#56B4E9", "fused_linear": "#F0E442",
    "refocus": "#000000",
}  # fmt: skip
MARKERS = {"ref": "o", "cpu": "s", "triton": "^", "cuda": "D"}
GREY, INK = "#9a9a9a", "#333333"
# Drawn at 1,500 pixels and read at 700: type of 13 points is then as tall as body text.
WIDTH, DPI, FONT = 10.0, 150, 13


def where(machine: dict[str, Any]) -> str:
    """The device, for a title."""
    threads = machine["threads"]
    return machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' if threads != 1 else ''}"


def _dot(row: Row) -> dict[str, Any]:
    if row.is_peer:
        return {"marker": "o", "s": 26, "facecolors": "none", "edgecolors": GREY, "linewidths": 1.2, "zorder": 3}
    colour, marker = COLOURS.get(row.op, INK), MARKERS.get(row.backend, "P")
    return {"marker": marker, "s": 80, "facecolors": colour, "edgecolors": "white", "linewidths": 0.8, "zorder": 4}


def _roofs(axis: Any, limits: dict[str, Any], x: tuple[float, float], dtypes: set[str]) -> list[float]:
    """Draw the roofs over the intensities `x`; returns the matrix rates. Slopes end at the highest flat roof."""
    rates = {name: rate for name, rate in limits.get("matrix_rate", {}).items() if name in dtypes}
    top = max(rates.values(), default=np.inf)
    both = {f"read {limits['read_bandwidth'] / 1e9:.0f} GB/s": (limits["read_bandwidth"], "-")}
    copy = max(limits["copy_bandwidth"], limits.get("update_bandwidth", 0.0))
    both[f"copy {copy / 1e9:.0f} GB/s"] = copy, "--"
    for name, (bandwidth, style) in both.items():
        end = min(x[1], top / bandwidth)
        axis.plot([x[0], end], [x[0] * bandwidth, end * bandwidth], style, color=INK, linewidth=1.5, label=name)
    for name, rate in rates.items():
        begin = max(x[0], rate / max(b for b, _ in both.values()))
        axis.plot([begin, x[1]], [rate, rate], color=INK, linewidth=1.5)
        axis.annotate(
            f"matrix {name} {rate / 1e12:.2g} TFLOP/s", (x[1], rate), (-4, 4), textcoords="offset points",
            ha="right", fontsize=FONT - 2, color=INK,
        )  # fmt: skip
    return list(rates.values())


def _draw_roofline(axis: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:
    at = [row.flops / row.bytes for row in rows]
    x = min(at, default=1.0) / 2, max(at, default=1.0) * 2
    # The flat roofs are only in sight where something comes near them.
    rates = [r for name, r in limits.get("matrix_rate", {}).items() if name in {row.dtype for row in rows}]
    if rates:
        x = x[0], max(x[1], 2 * max(rates) / limits["read_bandwidth"])
    roofs = _roofs(axis, limits, x, {row.dtype for row in rows})
    for row, intensity in zip(rows, at, strict=True):
        axis.scatter([intensity], [row.rate], **_dot(row))
    axis.set(xscale="log", yscale="log", xlim=x, xlabel="arithmetic intensity (FLOP/byte)", ylabel="FLOP/s")
    achieved = [row.rate or 0.0 for row in rows]
    axis.set_ylim(min(achieved, default=1.0) / 2, 2 * max([*roofs, *achieved, x[0] * limits["read_bandwidth"]]))
    axis.grid(which="major", color="#dddddd", linewidth=0.6)


def _draw_bandwidth(axis: Any, rows: Sequence[Row], limits: dict[str, Any]) -> None:
    cases = list(dict.fromkeys((row.op, row.case) for row in rows))
    for row in rows:
        axis.scatter([(row.bandwidth or 0.0) / 1e9], [cases.index((row.op, row.case))], **_dot(row))
    copy = max(limits["copy_bandwidth"], limits.get("update_bandwidth", 0.0))
    axis.axvline(copy / 1e9, color=INK, linestyle="--", linewidth=1.5)
    axis.set_yticks([])
    for y, (op, case) in enumerate(cases):
        # Inside, above the dots: as tick labels these names would take a third of the width.
        axis.text(0.01, y - 0.22, f"{op} {case}", transform=axis.get_yaxis_transform(), fontsize=FONT - 3, color=INK)
    axis.set(xscale="log", xlabel="GB/s, where nothing is computed", ylim=(len(cases) - 0.6, -0.7))
    axis.grid(axis="x", which="major", color="#dddddd", linewidth=0.6)


def _legend(rows: Sequence[Row], lines: Sequence[Any]) -> list[Any]:
    def dot(label: str, **style: Any) -> Line2D:
        return Line2D([], [], linestyle="none", label=label, **style)

    ops = dict.fromkeys(row.op for row in rows if not row.is_peer)
    backends = dict.fromkeys(row.backend for row in rows if not row.is_peer)
    out = [dot(op, marker="o", color=COLOURS.get(op, INK), markersize=9) for op in ops]
    out += [dot(f"backend {b}", marker=MARKERS.get(b, "P"), color=INK, markersize=8) for b in backends]
    if any(row.is_peer for row in rows):
        out.append(dot("peer", marker="o", markerfacecolor="none", markeredgecolor=GREY, markersize=6))
    return [*out, *lines]


def roofline(report: Report, path: Path) -> None:
    """Write a PNG of the rows that have a time."""
    rows = [row for row in report.rows if row.median_s]
    computing, moving = [r for r in rows if r.flops], [r for r in rows if not r.flops]
    strips = len({(r.op, r.case) for r in moving})
    heights = [5.6] + ([0.9 + 0.5 * strips] if moving else [])
    with plt.rc_context({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False}):
        figure, grid = plt.subplots(
            len(heights), 1, figsize=(WIDTH, sum(heights) + 1.6), height_ratios=heights, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        axes = grid[:, 0]
        _draw_roofline(axes[0], computing, report.limits)
        if moving:
            _draw_bandwidth(axes[1], moving, report.limits)
        axes[0].set_title(f"{where(report.machine)}, commit {report.commit}", fontsize=FONT - 1, loc="left")
        handles = _legend(rows, axes[0].get_legend_handles_labels()[0])
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=FONT - 1)
        figure.savefig(path, dpi=DPI)
        plt.close(figure)
