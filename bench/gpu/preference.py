"""The table of `mc_kernels.preference` from the rows of a run: what serves each op and shape, by measurement."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from bench.rows import Report, Row
from bench.workloads import Workload
from mc_kernels import preference
from mc_kernels.preference import BACKENDS, Key

# op and case as a workload names them -> what the registry looks a call of it up by
Keys = dict[tuple[str, str], Key]


class _Seen(Exception):
    """Ends a call whose arguments are known."""


class _Arguments(TorchDispatchMode):
    """Keeps the flat arguments of the first call of an op of ours, which then does not run."""

    args: tuple[Any, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "mc":
            self.args = args
            raise _Seen
        return func(*args, **(kwargs or {}))


def note_key(workload: Workload, keys: Keys) -> None:
    """Add the workload's key, as the registry will see its calls; nothing for an op that has none."""
    if workload.op not in preference.BUCKETS:
        return
    seen = _Arguments()
    try:
        with seen:
            workload.ours(workload.inputs[0], BACKENDS[0])
    except _Seen:
        *flat, _backend = seen.args
        keys[workload.op, workload.case.name] = preference.key(workload.op, flat)


def seconds(rows: Sequence[Row], keys: Mapping[tuple[str, str], Key]) -> dict[str, Any]:
    """seconds[op][dtype][bucket][backend]: the device's, and the host's to issue a call where they are known apart. Of
    the cases whose row says which of two backends to take: both were timed, or one was and the other's result is wrong.
    Cases that share a bucket count by their geometric mean."""
    found: dict[Key, list[dict[str, Row]]] = {}
    for (op, case), key in keys.items():
        mine = [r for r in rows if (r.op, r.case) == (op.removesuffix("_"), case) and r.backend in BACKENDS]
        timed = {r.backend: r for r in mine if r.median_s is not None}
        if timed and len(timed) + sum(r.correct is False for r in mine) > 1:
            found.setdefault(key, []).append(timed)
    out: dict[str, Any] = {}
    for (op, dtype, bucket), cases in sorted(found.items()):
        always = [b for b in BACKENDS if all(b in timed for timed in cases)]
        if always:
            parts = {b: _mean_parts([timed[b] for timed in cases]) for b in always}
            out.setdefault(op, {}).setdefault(dtype, {})[bucket] = parts
    return out


def _mean_parts(rows: Sequence[Row]) -> dict[str, float]:
    parts = {"device": [r.median_s for r in rows], "host": [r.host_s for r in rows]}
    return {
        name: float(f"{statistics.geometric_mean(known):.3g}")
        for name, values in parts.items()
        if len(known := [x for x in values if x is not None]) == len(rows)
    }


def save(path: Path, report: Report, keys: Mapping[tuple[str, str], Key]) -> int:
    """Write the table of a run in place of what was there; how many buckets it has. With none the file stays."""
    table = seconds(report.rows, keys)
    count = sum(len(buckets) for dtypes in table.values() for buckets in dtypes.values())
    if count:
        machine = report.machine
        measured = {name: str(machine[name]) for name in ("gpu", "cuda", "torch")}
        measured |= {"date": report.date, "commit": report.commit}
        page = {"about": preference.ABOUT, "measured": measured, "seconds": table}
        path.write_text(json.dumps(page, indent=1) + "\n")
    return count
