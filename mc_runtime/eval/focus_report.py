"""What `mc eval focus` found, as rows of a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .focus import FULL, GISTS, ORACLE, WINDOW, FocusResult, FocusSetting
from .statistics import Estimate, bootstrap, bootstrap_of_means, recovery_of_means, wilson

Column = NDArray[np.float64]
# Tokens per gist of the reports.
BLOCK = 32


def gain(result: FocusResult, arm: str) -> Estimate:
    """Nats per token below gists alone."""
    return bootstrap_of_means(lambda base, nll: base - nll, *_columns(result, GISTS, arm))


def share(result: FocusResult, arm: str) -> Estimate:
    """Of what the oracle gains."""
    columns = _columns(result, GISTS, arm, ORACLE)
    return bootstrap_of_means(lambda base, nll, best: (base - nll) / (base - best), *columns)


def recovery(result: FocusResult, arm: str) -> Estimate:
    return bootstrap_of_means(recovery_of_means, *_columns(result, WINDOW, FULL, arm))


def rank(result: FocusResult, selector: str) -> Estimate | None:
    """Mean rank correlation over the contexts in which it is defined."""
    values = np.array(result.rank[selector])
    values = values[np.isfinite(values)]
    return bootstrap(lambda x: float(x.mean()), values) if len(values) else None


def found(result: FocusResult, selector: str) -> Estimate:
    """How often the block that matters is among the opened ones."""
    return wilson(sum(result.found[selector]), len(result.found[selector]))


def _columns(result: FocusResult, *arms: str) -> list[Column]:
    return [np.array(result.nll[arm], np.float64) for arm in arms]


def rows(result: FocusResult, setting: FocusSetting, size: int) -> list[tuple[str, ...]]:
    """(text, arm, slots, nats per token, gain, share of the oracle's, recovery, rank correlation, found)."""
    slots = {FULL: setting.far, WINDOW: 0, GISTS: setting.far // size}
    lines: list[tuple[str, ...]] = []
    for arm, values in result.nll.items():
        chosen = arm in result.found
        correlation = rank(result, arm) if arm in result.rank else None
        lines.append(
            (
                result.text,
                arm,
                str(slots.get(arm, setting.slots(size))),
                f"{np.mean(values):.3f}",
                gain(result, arm).text(3) if chosen else "",
                share(result, arm).text() if chosen else "",
                recovery(result, arm).text(),
                "" if correlation is None else correlation.text(),
                found(result, arm).text() if chosen else "",
            )
        )
    return lines


def to_dict(result: FocusResult) -> dict[str, Any]:
    """JSON data: every context's figures, and the estimates."""
    estimates: dict[str, Any] = {}
    for arm in result.nll:
        mine: dict[str, Any] = {"recovery": asdict(recovery(result, arm))}
        if arm in result.found:
            mine |= {"gain": asdict(gain(result, arm)), "share": asdict(share(result, arm))}
            mine["found"] = asdict(found(result, arm))
        if arm in result.rank and (estimate := rank(result, arm)) is not None:
            mine["rank"] = asdict(estimate)
        estimates[arm] = mine
    finite = {name: [x if np.isfinite(x) else None for x in values] for name, values in result.rank.items()}
    return {"text": result.text, "estimates": estimates, "nll": result.nll, "rank": finite, "found": result.found}


def markdown(data: dict[str, Any]) -> str:
    """A report as a table: arms down; per text recovery, and for what chooses blocks, gain and rank correlation."""
    setting, texts = data["setting"], data["texts"]
    slots = FocusSetting(**setting).slots(BLOCK)
    lines = [
        f"{setting['far']:,} tokens as gists, {setting['opened']} blocks opened ({slots} slots), {setting['recent']} "
        f"recent tokens, {setting['targets']} targets, n = {setting['n']} per text; {data['model']}. Recovery; gain "
        "over gists alone in nats per token; rank correlation with measured gains. 95% intervals.",
        "",
        "| arm | " + " | ".join(one["text"] for one in texts) + " |",
        "|---" * (len(texts) + 1) + "|",
    ]
    for arm in dict.fromkeys(arm for one in texts for arm in one["estimates"]):
        lines.append(f"| {arm} | " + " | ".join(_cell(one["estimates"].get(arm)) for one in texts) + " |")
    return "\n".join(lines)


def _cell(estimates: dict[str, Any] | None) -> str:
    if estimates is None:
        return ""
    parts = [Estimate(**estimates["recovery"]).text()]
    if "gain" in estimates:
        parts.append(f"gain {estimates['gain']['value']:.3f}")
    if "rank" in estimates:
        parts.append(f"rank {estimates['rank']['value']:.2f}")
    return "; ".join(parts)
