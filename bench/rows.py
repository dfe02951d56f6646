"""The report: one row per candidate of a case, and its JSON and CSV files."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .jsonable import plain


@dataclass(frozen=True)
class Row:
    """What was measured of one candidate (a backend of ours, or a peer) on one case.

    median_s, spread: seconds per call and half the 10-to-90% range over the median; None where the result was wrong. On
    a GPU they are the device's own, and host_s is what the host takes to issue a call; where the call waits for the
    device (waits), median_s includes the host's part and host_s is None.
    bytes, flops: from the op's `cases.py`. limit_s: the time that the measured limits allow for them.
    fraction_of_limit: the limit's time over ours, taken round by round; fraction_at_rows: the same with the matrix rate
    that torch reaches at the case's row count.
    peer, peer_ratio: best peer, and its time over ours (above 1: we are faster), taken round by round; our rows only.
    correct, error: the oracle's verdict; the reason where it rejects or where the candidate cannot run.
    max_error: largest absolute difference from the oracle. cache: "cold" or "warm", and how it was made so.
    same_work: False for a peer that does less, which is never the best one; note says what.
    """

    op: str
    case: str
    backend: str
    device: str
    dtype: str
    bytes: int
    flops: int
    is_peer: bool = False
    median_s: float | None = None
    spread: float | None = None
    host_s: float | None = None
    waits: bool = False
    runs: int = 0
    limit_s: float | None = None
    fraction_of_limit: float | None = None
    fraction_at_rows: float | None = None
    peer: str | None = None
    peer_ratio: float | None = None
    correct: bool | None = None
    max_error: float | None = None
    error: str | None = None
    cache: str = "cold"
    note: str = ""
    same_work: bool = True

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the row in another report."""
        return self.op, self.case, self.backend, self.device, self.dtype, self.cache.split()[0]

    @property
    def bandwidth(self) -> float | None:
        return self.bytes / self.median_s if self.median_s else None

    @property
    def rate(self) -> float | None:
        return self.flops / self.median_s if self.median_s else None


@dataclass
class Report:
    """Everything of a run. `limits` and `machine` are of the same run as the rows."""

    commit: str
    date: str
    machine: dict[str, Any]
    limits: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # peer -> why it is absent
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write `.json` (everything) or `.csv` (the rows)."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, [f.name for f in fields(Row)])
                writer.writeheader()
                writer.writerows(asdict(row) for row in self.rows)
        else:
            path.write_text(json.dumps(plain(asdict(self)), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read what `save` wrote as JSON. Raises ValueError if it is something else."""
        try:
            data = json.loads(path.read_text())
            rows = [Row(**row) for row in data.pop("rows")]
            return cls(**data, rows=rows)
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: expected a report of bench/run.py ({error})") from error
