"""What a run of `e2e` found, and its JSON file. Times are in the unit that their name ends in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.jsonable import plain


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `count` values; None without any."""

    median: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Spread:
        """Of `values * scale`."""
        if not len(values):
            return cls(None, None, None, 0)
        low, median, high = (round(float(x) * scale, 4) for x in np.percentile(values, (25, 50, 75)))
        return cls(median, low, high, len(values))

    def text(self, digits: int = 1) -> str:
        """`34.2 (32.6 to 37.5)`."""
        if self.median is None or self.low is None or self.high is None:
            return "-"
        return f"{self.median:,.{digits}f} ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


@dataclass
class EndToEndReport:
    """settings: options of the run. ingest: how text came in, "contextual" and "fast". first_token, decode, rivals: one
    row per length. skipped: rival -> why it is absent."""

    commit: str
    date: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    ingest: dict[str, Any] = field(default_factory=dict)
    first_token: list[dict[str, Any]] = field(default_factory=list)
    decode: list[dict[str, Any]] = field(default_factory=list)
    rivals: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain(asdict(self)), indent=1) + "\n", encoding="utf-8")
