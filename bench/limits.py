"""What this machine can do at best, measured in the same run as everything that is held against it.

Bandwidth counts bytes read plus bytes written. "read" is the fastest of torch's reductions; "copy" the faster of
copying one buffer to another and rewriting one in place (a processor that must fetch a line before it writes it copies
slower than it updates, and a splice updates). The matrix rate is measured per dtype on a large product and, for
reference, at a case's own number of rows. A kernel above 100% says that a probe has to be improved.

Machines drift, so a limit is no constant: the probes that bound an op run in alternation with its candidates, and a
fraction of the limit is taken round by round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .machine import last_level_cache
from .timing import Burst, Clock, Timed, interleave

# A probe's buffers are this many times the largest cache.
PROBE_CACHES = 4
MATRIX = {"cpu": 1024, "cuda": 8192}
# Width of the product that shows the rate at few rows: a weight that fits a CPU's cache.
ROW_WIDTH = 1024
MAX_ROWS = 1 << 14
# The matrix probe joins where matrix work takes at least this share of the limit.
MATRIX_SHARE = 0.1


@dataclass(frozen=True)
class Probe:
    """work: bytes or FLOPs of one call of `run`."""

    name: str
    run: Callable[[], object]
    work: int

    def burst(self) -> Burst:
        return Burst(lambda _: self.run(), [None])


class Limits:
    """Probes of one device, and every rate that they have shown, in B/s and FLOP/s."""

    def __init__(self, device: torch.device, seconds: float = 0.5, clock: Clock | None = None) -> None:
        """Choose the fastest read and copy; about 4 x `seconds`."""
        self.device, self.seconds, self.clock = device, seconds, clock
        n = PROBE_CACHES * last_level_cache(device)
        a = torch.ones(n // 4, dtype=torch.float32, device=device)
        b = torch.zeros(n // 8, dtype=torch.float32, device=device)
        first, second = a[: n // 8], a[n // 8 :]
        self._rates: dict[str, list[float]] = {}
        self._at_rows: dict[tuple[torch.dtype, int], float] = {}
        self._matrix: dict[torch.dtype, Probe] = {}
        self.read = self._fastest(
            Probe("read", a.sum, n),
            Probe("read", lambda: torch.dot(first, second), n),
            Probe("read", lambda: a.view(torch.int64).sum(), n),
        )
        self.copy = self._fastest(Probe("copy", lambda: b.copy_(first), n), Probe("update", lambda: a.mul_(1.0), 2 * n))

    def _fastest(self, *probes: Probe) -> Probe:
        """The fastest of the probes; its rates are kept, and the best of each other name's."""
        timed = self._timed(*probes, seconds=self.seconds * len(probes))
        ranked = sorted(zip(probes, timed, strict=True), key=lambda pair: pair[1].median / pair[0].work)
        for probe, t in ranked:
            if probe.name not in self._rates:
                self._record(probe, t)
        return ranked[0][0]

    def _timed(self, *probes: Probe, seconds: float) -> list[Timed]:
        return interleave([p.burst() for p in probes], self.device, seconds=seconds, clock=self.clock)

    def _record(self, probe: Probe, timed: Timed) -> list[float]:
        rates = [probe.work / s for s in timed.samples]
        self._rates.setdefault(probe.name, []).extend(rates)
        return rates

    def _matrix_probe(self, dtype: torch.dtype) -> Probe:
        if dtype not in self._matrix:
            n = MATRIX[self.device.type]
            x, w = (torch.randn(n, n, device=self.device).to(dtype) for _ in range(2))
            name = f"matrix {str(dtype).removeprefix('torch.')}"
            probe = Probe(name, lambda: torch.nn.functional.linear(x, w), 2 * n**3)
            self._matrix[dtype] = probe
            (timed,) = self._timed(probe, seconds=self.seconds)
            self._record(probe, timed)
        return self._matrix[dtype]

    def rate(self, name: str) -> float:
        """Median of everything that the probe of this name has shown."""
        return statistics.median(self._rates[name])

    def matrix_rate(self, dtype: torch.dtype, rows: int | None = None) -> float:
        """FLOP/s of the large square product, or with `rows` of [rows, n] x [n, n] with n = ROW_WIDTH."""
        if rows is None:
            return self.rate(self._matrix_probe(dtype).name)
        key = dtype, max(1, min(rows, MAX_ROWS))
        if key not in self._at_rows:
            x, w = (torch.randn(s, ROW_WIDTH, device=self.device).to(dtype) for s in (key[1], ROW_WIDTH))
            probe = Probe("", lambda: torch.nn.functional.linear(x, w), 2 * key[1] * ROW_WIDTH**2)
            (timed,) = self._timed(probe, seconds=self.seconds / 2)
            self._at_rows[key] = probe.work / timed.median
        return self._at_rows[key]

    def probes(self, kind: str, traffic: int, flops: int, dtype: torch.dtype) -> list[Probe]:
        """The probes that bound an op: its bandwidth ("read" or "copy") and, where it matters, the matrix rate."""
        bandwidth = self.read if kind == "read" else self.copy
        out = [bandwidth]
        if flops and flops / self.matrix_rate(dtype) > MATRIX_SHARE * traffic / self.rate(bandwidth.name):
            out.append(self._matrix_probe(dtype))
        return out

    def per_round(self, probes: list[Probe], timed: list[Timed], traffic: int, flops: int) -> list[float]:
        """The limit in seconds in each round, from what the probes took in it."""
        rates = [self._record(probe, t) for probe, t in zip(probes, timed, strict=True)]
        works = [traffic, flops]
        return [max(w / rate for w, rate in zip(works, at, strict=False)) for at in zip(*rates, strict=True)]

    def describe(self) -> dict[str, Any]:
        """The `limits` part of a report: medians over the whole run."""
        matrix = {name.removeprefix("matrix "): self.rate(name) for name in self._rates if name.startswith("matrix ")}
        at_rows = {f"{str(d).removeprefix('torch.')}[{r}]": v for (d, r), v in sorted(self._at_rows.items(), key=str)}
        return {
            "read_bandwidth": self.rate("read"),
            "copy_bandwidth": self.rate("copy"),
            "update_bandwidth": self.rate("update"),
            "matrix_rate": matrix,
            "matrix_rate_at_rows": at_rows,
        }


def flusher(device: torch.device, cache_bytes: int) -> Callable[[], Tensor]:
    """A function that pushes everything else out of the caches: it reads a buffer of twice their size (written lines
    would have to be written back during the next measurement)."""
    buffer = torch.zeros(2 * cache_bytes // 4, dtype=torch.float32, device=device)
    return buffer.sum
