"""What `mc eval staleness` found: a table, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .markdown import estimate, lines_of
from .staleness import ANEW, MODES, Reading, StalenessSetting
from .statistics import Estimate, bootstrap_of_means

SCHEMA = "megacontext/staleness/1"
OVERALL = "all texts"
FIGURES = ("kl", "right", "agrees", "recomputed")

Readings = Mapping[str, Sequence[Reading]]
COLOURS = {"none": "#c2477f", "tail": "#d98f2b", "top": "#4a5570", "full": "#2f8f6b"}
INK, FAINT = "#1b2233", "#d9dde6"


def with_overall(texts: Readings) -> dict[str, Sequence[Reading]]:
    """The texts that have readings, and all of them as one where there are several."""
    found = {name: readings for name, readings in texts.items() if readings}
    return found if len(found) < 2 else {**found, OVERALL: [one for readings in found.values() for one in readings]}


def estimates(readings: Sequence[Reading]) -> dict[tuple[int, str], dict[str, Estimate]]:
    """(edits, mode) -> figure -> its mean over contexts."""
    groups: dict[tuple[int, str], list[Reading]] = {}
    for one in readings:
        groups.setdefault((one.edits, one.mode), []).append(one)
    return {
        key: {
            name: bootstrap_of_means(lambda x: x, np.array([getattr(one, name) for one in group], np.float64))
            for name in FIGURES
        }
        for key, group in groups.items()
    }


def rows(text: str, readings: Sequence[Reading]) -> list[tuple[str, ...]]:
    """(text, edits, mode, KL, right, agrees, recomputed)."""
    lines: list[tuple[str, ...]] = []
    for (edits, mode), found in estimates(readings).items():
        kl, agrees = found["kl"], found["agrees"]
        own = mode == ANEW
        lines.append(
            (
                text,
                str(edits),
                mode,
                "" if own else f"{kl.value:.1e} [{kl.low:.1e}, {kl.high:.1e}]",
                found["right"].text(3),
                "" if own else agrees.text(3),
                f"{found['recomputed'].value:,.0f}" + (" in all" if own else ""),
            )
        )
    return lines


def to_dict(about: dict[str, Any], texts: Readings, setting: StalenessSetting) -> dict[str, Any]:
    """JSON data: setting, estimates, every reading."""
    found = []
    for name, readings in with_overall(texts).items():
        table = [
            {"edits": edits, "mode": mode, **{figure: asdict(e) for figure, e in figures.items()}}
            for (edits, mode), figures in estimates(readings).items()
        ]
        one: dict[str, Any] = {"text": name, "estimates": table}
        if name != OVERALL:
            one["readings"] = [asdict(reading) for reading in readings]
        found.append(one)
    return {"schema": SCHEMA, **about, "setting": asdict(setting), "texts": found}


def markdown(data: dict[str, Any]) -> str:
    """A report as a table: edits and modes down, texts across: KL and the share of the same first choice."""
    setting, texts = data["setting"], data["texts"]
    title = (
        f"KL(assembled anew || mode), nats per token; share of the same first choice. {setting['history']:,} tokens in "
        f"{setting['budget']:,} slots, n = {setting['n']} per text; gists {data['gistnet'] or 'untrained'}; "
        f"{data['model']}. 95% intervals."
    )
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for one in texts:
        for found in one["estimates"]:
            if found["mode"] != ANEW:
                kl = Estimate(**found["kl"])
                text = f"{kl.value:.1e} [{kl.low:.1e}, {kl.high:.1e}]; {estimate(found['agrees'])}"
                cells.setdefault((found["edits"], found["mode"]), {})[one["text"]] = text
    names = [one["text"] for one in texts]
    rows = [[str(edits), mode, *(found.get(name, "") for name in names)] for (edits, mode), found in cells.items()]
    return lines_of(title, ["edits", "refresh", *names], rows)


def draw(texts: Readings, path: Path, title: str) -> None:
    """KL (above; 0 is off the scale) and agreement (below) over the number of edits; a column per text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = with_overall(texts)
    figure, axes = plt.subplots(
        2, len(shown), squeeze=False, sharex=True, sharey="row", layout="constrained",
        figsize=(1.5 + 3 * len(shown), 5.4),
    )  # fmt: skip
    for column, (name, readings) in enumerate(shown.items()):
        found = estimates(readings)
        for axis, figure_name in zip(axes[:, column], ("kl", "agrees"), strict=True):
            for mode in MODES:
                points = [(edits, e[figure_name]) for (edits, m), e in found.items() if m == mode]
                x, y = [edits for edits, _ in points], [e.value for _, e in points]
                error = [[e.value - e.low for _, e in points], [e.high - e.value for _, e in points]]
                axis.errorbar(x, y, error, label=mode, color=COLOURS[mode], marker="o", markersize=3, capsize=2)
            axis.set_xscale("log", base=2)
            axis.set_xticks(x, [str(n) for n in x])
            axis.grid(color=FAINT, linewidth=0.6)
            axis.tick_params(length=0, labelsize=8, colors=INK)
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[0, column].set_yscale("log")
        axes[0, column].set_title(name, fontsize=9, color=INK, loc="left")
        axes[1, column].set_xlabel("edits", fontsize=8, color=INK)
    axes[0, 0].set_ylabel("KL(anew || mode), nats per token", fontsize=8, color=INK)
    axes[1, 0].set_ylabel("same first choice", fontsize=8, color=INK)
    axes[0, -1].legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
