"""What `mc eval layout` found: tables, JSON and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .layout import RECENCY, LayoutResult, LayoutSetting, Point
from .markdown import estimate, lines_of
from .statistics import Estimate, bootstrap_of_means
from .swaps import Cycle, changed_share, residency

SCHEMA = "megacontext/layout/1"
OVERALL = "all texts"
OURS, RIVAL, INK, FAINT = "#c2477f", "#9aa3b5", "#1b2233", "#d9dde6"


def with_overall(results: Sequence[LayoutResult]) -> list[LayoutResult]:
    """The texts that have points, and all of them as one where there are several."""
    found = [result for result in results if result.points]
    if len(found) < 2:
        return found
    total = LayoutResult(OVERALL, [point for result in found for point in result.points])
    for result in found:
        for name, runs in result.cycles.items():
            total.cycles.setdefault(name, []).extend(runs)
    return [*found, total]


def arms(result: LayoutResult) -> list[str]:
    """That were measured at every point."""
    return [name for name in result.points[0].nll if all(name in point.nll for point in result.points)]


def nll(result: LayoutResult, arm: str) -> NDArray[np.float64]:
    """[n] nats per target."""
    return np.array([point.nll[arm] for point in result.points], np.float64)


def against(result: LayoutResult, arm: str, rival: str = RECENCY) -> Estimate:
    """NLL of an arm minus that of its rival at the same points: below 0 it is better."""
    return bootstrap_of_means(lambda a, b: a - b, nll(result, arm), nll(result, rival))


def slots(points: Sequence[Point], arm: str) -> tuple[float, float]:
    """Mean slots in use, and of these tokens in full."""
    used = [point.slots[arm] for point in points]
    return float(np.mean([sum(levels.values()) for levels in used])), float(np.mean([x.get(0, 0) for x in used]))


def rows(result: LayoutResult) -> list[tuple[str, ...]]:
    """(text, arm, slots, of these tokens, nats per target, against recency)."""
    lines: list[tuple[str, ...]] = []
    for arm in arms(result):
        used, tokens = slots(result.points, arm)
        difference = "" if arm == RECENCY else against(result, arm).text(3)
        lines.append((result.text, arm, f"{used:,.0f}", f"{tokens:,.0f}", f"{nll(result, arm).mean():.3f}", difference))
    return lines


def swaps(runs: Sequence[Sequence[Cycle]], block_size: int) -> dict[str, Any]:
    """Figures of one policy's runs: per settled cycle, changed nodes per block of the context, with its interval, and
    entries recomputed; the residency of opened blocks, of all cycles. None where nothing was seen."""
    settled = [cycle for run in runs for cycle in run if not cycle.filling]
    stay = residency(runs)
    share = np.array([changed_share(cycle, block_size) for cycle in settled])
    return {
        "cycles": len(settled),
        "changed": asdict(bootstrap_of_means(lambda x: x, share)) if len(share) else None,
        "recomputed": float(np.mean([cycle.recomputed for cycle in settled])) if settled else None,
        "residency": stay.cycles,
        **asdict(stay),
    }


def swap_rows(result: LayoutResult, block_size: int) -> list[tuple[str, ...]]:
    """(text, policy, cycles, changed per block, residency, shortest stay, blocks closed, recomputed per cycle)."""
    lines: list[tuple[str, ...]] = []
    for policy, runs in result.cycles.items():
        found = swaps(runs, block_size)
        changed, stay = found["changed"], found["residency"]
        lines.append(
            (
                result.text,
                policy,
                str(found["cycles"]),
                "" if changed is None else Estimate(**changed).text(3),
                "none closed" if stay is None else f"{stay:.1f}",
                "" if found["shortest"] is None else str(found["shortest"]),
                str(found["closed"]),
                "" if found["recomputed"] is None else f"{found['recomputed']:,.0f}",
            )
        )
    return lines


def to_dict(about: dict[str, Any], results: Sequence[LayoutResult], setting: LayoutSetting) -> dict[str, Any]:
    """JSON data: setting, estimates, every point, every cycle."""
    texts = []
    for result in with_overall(results):
        estimates = {arm: asdict(against(result, arm)) for arm in arms(result) if arm != RECENCY}
        found = {policy: swaps(runs, setting.block_size) for policy, runs in result.cycles.items()}
        one: dict[str, Any] = {"text": result.text, "against_recency": estimates, "swaps": found}
        if result.text != OVERALL:
            one["points"] = [asdict(point) for point in result.points]
            one["cycles"] = {
                policy: [[_plain(cycle) for cycle in run] for run in runs] for policy, runs in result.cycles.items()
            }
        texts.append(one)
    return {"schema": SCHEMA, **about, "setting": asdict(setting), "texts": texts}


def markdown(data: dict[str, Any]) -> str:
    """A report as a table: arms down, texts across: NLL against recency; then how restless each policy is."""
    setting, texts = data["setting"], data["texts"]
    title = (
        f"NLL against recency at as many slots, nats per token (below 0: better); {setting['history']:,} tokens in "
        f"{setting['budget']:,} slots, n = {setting['n']} per text; gists {data['gistnet'] or 'untrained'}; "
        f"{data['model']}. 95% intervals."
    )
    arms = dict.fromkeys(arm for one in texts for arm in one["against_recency"])
    rows = []
    for arm in arms:
        cells = [one["against_recency"].get(arm) for one in texts]
        last = texts[-1]["swaps"].get(arm)
        changed = "" if last is None or last["changed"] is None else estimate(last["changed"], 3)
        stay = "" if last is None else "none closed" if last["residency"] is None else f"{last['residency']:.1f}"
        rows.append([arm, *("" if cell is None else estimate(cell, 3) for cell in cells), changed, stay])
    names = [one["text"] for one in texts]
    return lines_of(title, ["arm", *names, "changed per block", "residency, cycles"], rows)


def _plain(cycle: Cycle) -> dict[str, Any]:
    return asdict(cycle) | {"opened": sorted(cycle.opened), "closed": sorted(cycle.closed)}


def draw(results: Sequence[LayoutResult], path: Path, title: str) -> None:
    """NLL against recency, a panel per text, bars with 95% intervals; to the left of the line the arm is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = with_overall(results)
    names = [arm for arm in arms(found[-1]) if arm != RECENCY][::-1]
    figure, axes = plt.subplots(
        1, len(found), squeeze=False, sharex=True, sharey=True, layout="constrained",
        figsize=(2.6 + 3 * len(found), 1.4 + 0.3 * len(names)),
    )  # fmt: skip
    for axis, result in zip(axes[0], found, strict=True):
        for place, name in enumerate(names):
            if name not in arms(result):
                continue
            e = against(result, name)
            axis.barh(place, e.value, height=0.7, color=OURS if name in result.cycles else RIVAL)
            axis.plot((e.low, e.high), (place, place), color=INK, linewidth=1.1)
        axis.set_yticks(range(len(names)), names, fontsize=8, color=INK)
        axis.axvline(0, color=INK, linewidth=0.8)
        axis.grid(axis="x", color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(length=0, labelsize=8, colors=INK)
        axis.set_title(f"{result.text}, n = {len(result.points)}", fontsize=9, color=INK, loc="left")
        axis.set_xlabel("nats per token above recency at as many slots", fontsize=8, color=INK)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
