"""What this machine can do at best, measured in the same run as everything that is held against it.

Bandwidth counts bytes read plus bytes written. The matrix rate is measured per dtype on a large product and, on request,
at a number of rows. All with torch's own kernels: a kernel of ours may come out above 100%, and then the limit is what
has to be measured better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .timing import Burst, Timed, interleave

COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MATRIX = {"cpu": 2048, "cuda": 8192}
# Width of the product that shows the rate at few rows: a weight that fits a CPU's cache.
ROW_WIDTH = 1024
SECONDS = 1.0


def _fastest(runs: list[Callable[[], object]], device: torch.device, seconds: float) -> float:
    """Shortest median of the alternatives, in seconds."""
    bursts = [Burst(lambda _, run=run: run(), [None]) for run in runs]  # type: ignore[misc]
    timed: list[Timed] = interleave(bursts, device, seconds=seconds)
    return min(t.median for t in timed)


class Limits:
    """Bandwidths in B/s, matrix rates in FLOP/s; rates are measured when first asked for."""

    def __init__(self, device: torch.device, seconds: float = SECONDS) -> None:
        self.device, self.seconds = device, seconds
        n = COPY_BYTES[device.type]
        a = torch.ones(n // 4, dtype=torch.float32, device=device)
        b = torch.zeros_like(a)
        self.copy_bandwidth = 2 * n / _fastest([lambda: b.copy_(a)], device, seconds)
        # No single reduction of torch is the fastest everywhere.
        half = n // 8
        reads: list[Callable[[], object]] = [a.sum, a.max, lambda: torch.dot(a[:half], a[half:])]
        self.read_bandwidth = n / _fastest(reads, device, seconds)
        self._rates: dict[tuple[torch.dtype, int | None], float] = {}

    def matrix_rate(self, dtype: torch.dtype, rows: int | None = None) -> float:
        """FLOP/s of a product [rows, n] x [n, n]; rows=None: the large square one."""
        key = (dtype, rows)
        if key not in self._rates:
            n = MATRIX[self.device.type] if rows is None else ROW_WIDTH
            m = n if rows is None else max(1, min(rows, 1 << 14))
            x, w = (torch.randn(s, n, device=self.device).to(dtype) for s in (m, n))
            seconds = _fastest([lambda: torch.nn.functional.linear(x, w)], self.device, self.seconds / 2)
            self._rates[key] = 2 * m * n * n / seconds
        return self._rates[key]

    def seconds_for(self, traffic: int, flops: int, dtype: torch.dtype, kind: str, rows: int | None = None) -> float:
        """The time below which nothing can get: `kind` says which bandwidth ("read" or "copy") bounds the traffic."""
        bandwidth = self.read_bandwidth if kind == "read" else self.copy_bandwidth
        return max(traffic / bandwidth, flops / self.matrix_rate(dtype, rows) if flops else 0.0)

    def describe(self) -> dict[str, Any]:
        """The `limits` part of a report."""
        rates = {
            f"{str(d).removeprefix('torch.')}{'' if r is None else f'[{r}]'}": v for (d, r), v in self._rates.items()
        }
        return {
            "copy_bandwidth": self.copy_bandwidth,
            "read_bandwidth": self.read_bandwidth,
            "matrix_rate": dict(sorted(rates.items())),
        }


def flusher(device: torch.device, cache_bytes: int) -> Callable[[], Tensor]:
    """A function that pushes everything else out of the caches: it reads a buffer of twice their size (written lines
    would have to be written back during the next measurement)."""
    buffer = torch.zeros(2 * cache_bytes // 4, dtype=torch.float32, device=device)
    return buffer.sum
