"""What `mc eval substitutability` found, as JSON and as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mc_runtime.errors import InputError

from .statistics import Estimate
from .substitutability import Arm, Comparison, Setting

SCHEMA = "megacontext/substitutability/1"


@dataclass(frozen=True)
class Weights:
    """A file of trained weights: its name, and digits that tell its content from others'."""

    file: str
    fingerprint: str


@dataclass(frozen=True, eq=False)
class Report:
    """model: as it was named; model_fingerprint: of its weights; dtype: that it ran in. comparisons: by text, then
    ratio."""

    model: str
    model_fingerprint: str
    dtype: str
    weights: tuple[Weights, ...]
    setting: Setting
    comparisons: tuple[Comparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON data: per window NLLs, and what is computed of them, so that other tools need not."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "dtype": self.dtype,
            "weights": [asdict(w) for w in self.weights],
            "setting": asdict(self.setting) | {"ratios": list(self.setting.ratios)},
            "comparisons": [_comparison_dict(c) for c in self.comparisons],
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """What `to_dict` gave; estimates are computed again from the NLLs. Raises InputError for anything else."""
        if data.get("schema") != SCHEMA:
            raise InputError(f"schema: expected {SCHEMA}, got {data.get('schema')!r}")
        try:
            comparisons = tuple(
                Comparison(
                    c["text"],
                    c["ratio"],
                    tuple(Arm(a["name"], a["kind"], a["anew"], a["slots"], np.array(a["nll"])) for a in c["arms"]),
                )
                for c in data["comparisons"]
            )
            setting = Setting(**(data["setting"] | {"ratios": tuple(data["setting"]["ratios"])}))
            weights = tuple(Weights(**w) for w in data["weights"])
            return cls(data["model"], data["model_fingerprint"], data["dtype"], weights, setting, comparisons)
        except (KeyError, TypeError) as error:
            raise InputError(f"report: does not hold what {SCHEMA} asks for ({error})") from error


def _comparison_dict(c: Comparison) -> dict[str, Any]:
    arms = [
        {
            "name": arm.name,
            "kind": arm.kind,
            "anew": arm.anew,
            "slots": arm.slots,
            "nats_per_token": float(arm.nll.mean()),
            "delta_nll": asdict(c.delta(arm)),
            "recovery": asdict(c.recovery(arm)),
            "nll": arm.nll.tolist(),
        }
        for arm in c.arms
    ]
    paired = [
        {"ours": arm.name, "rival": best.name, "anew": best.anew, "nll": asdict(nll), "recovery": asdict(recovery)}
        for arm in c.arms
        if arm.kind == "ours"
        for best in c.best_rivals
        for nll, recovery in (c.ahead(arm, best),)
    ]
    return {"text": c.text, "ratio": c.ratio, "arms": arms, "ours_minus_best_rival": paired}


def rows(c: Comparison) -> list[tuple[str, str, str, str]]:
    """(arm, nats per token, above full context, recovery); the best rivals are starred, those that choose anew have a
    dagger."""
    found = []
    for arm in c.arms:
        mark = " †" * arm.anew + " *" * (arm in c.best_rivals)
        found.append((arm.name + mark, f"{arm.nll.mean():.3f}", c.delta(arm).text(3), c.recovery(arm).text()))
    return found


def verdicts(c: Comparison) -> list[str]:
    """A line for each of our arms and each best rival: paired differences."""
    return [
        f"{arm.name} - {best.name}: recovery {signed(recovery)}, nats {signed(nll, 3)}"
        for arm in c.arms
        if arm.kind == "ours"
        for best in c.best_rivals
        for nll, recovery in (c.ahead(arm, best),)
    ]


def markdown(reports: Sequence[Report]) -> str:
    """Recovery with 95% intervals: a table per setting and ratio, arms down, texts across, the best rival in bold."""
    parts = []
    for report in reports:
        s = report.setting
        for ratio in s.ratios:
            comparisons = [c for c in report.comparisons if c.ratio == ratio]
            if comparisons:
                parts.append(_markdown_table(report, ratio, comparisons))
    return "\n\n".join(parts)


def _markdown_table(report: Report, ratio: int, comparisons: Sequence[Comparison]) -> str:
    s = report.setting
    slots = s.far // ratio
    lines = [
        f"{ratio}:1: {s.far:,} tokens in {slots:,} slot{'' if slots == 1 else 's'}, {s.recent} recent tokens, "
        f"{s.targets} targets, {'packed' if s.packed else 'true'} positions, n = {s.n} per text; "
        f"{report.model}. Recovery with 95% intervals; bold: the best rival that chooses once, and the best that keeps "
        "all K/V or text aside and chooses anew (†).",
        "",
        "| arm | " + " | ".join(c.text for c in comparisons) + " |",
        "|---" * (len(comparisons) + 1) + "|",
    ]
    sort = {a.name: a for c in comparisons for a in c.arms if a.kind != "bound"}
    for name, some in sort.items():
        cells = []
        for c in comparisons:
            arm = next((a for a in c.arms if a.name == name), None)
            text = "" if arm is None else c.recovery(arm).text()
            cells.append(f"**{text}**" if arm in c.best_rivals else text)
        lines.append(f"| {name}{' †' * some.anew} | " + " | ".join(cells) + " |")
    for name in (name for name, arm in sort.items() if arm.kind == "ours"):
        for anew, label in ((False, "best rival"), (True, "best rival †")):
            best = [c.best_rival(anew=anew) for c in comparisons]
            if any(best):
                cells = [signed(c.ahead(c[name], b)[1]) if b else "" for c, b in zip(comparisons, best, strict=True)]
                lines.append(f"| {name} minus {label} | " + " | ".join(cells) + " |")
    bounds = [f"{c.arms[0].nll.mean():.3f} / {c.arms[1].nll.mean():.3f}" for c in comparisons]
    lines.append("| nats per token: full context / recent window | " + " | ".join(bounds) + " |")
    return "\n".join(lines)


def signed(e: Estimate, digits: int = 2) -> str:
    """A difference and its interval, with signs."""
    return f"{e.value:+.{digits}f} [{e.low:+.{digits}f}, {e.high:+.{digits}f}]"
