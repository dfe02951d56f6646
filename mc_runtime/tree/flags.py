"""The flags of one level's nodes, kept as runs of equal flags.

Runs, because a level is written in long stretches of one kind: a tree of ten million tokens has a handful, they
fit in the catalogue, and so change together with the lengths in one commit. A crash cannot leave a flag that is
ahead of its row.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mc_runtime.errors import TreeError


class FlagRuns:
    """Flags of the nodes 0..`count`: run r has the flags `values[r]` and starts at node `starts[r]`.

    Neighbouring runs differ. A published object is never changed; a transaction works on a `copy`, whose
    `touched` then names the starts at which a run appeared, changed or vanished.
    """

    __slots__ = ("_arrays", "count", "starts", "touched", "values")

    def __init__(self) -> None:
        self.count = 0
        self.starts: list[int] = []
        self.values: list[int] = []
        self.touched: set[int] = set()
        self._arrays: tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]] | None = None

    @classmethod
    def load(cls, count: int, runs: Iterable[tuple[int, int]]) -> "FlagRuns":
        """From a count and (start, flags) pairs in order. Raises `TreeError` when they do not fit together."""
        result = cls()
        result.count = count
        for start, value in runs:
            result.starts.append(start)
            result.values.append(value)
        starts = result.starts
        ordered = all(a < b for a, b in pairwise(starts))
        inside = (starts[0] == 0 and starts[-1] < count) if starts else count == 0
        if not (ordered and inside and all(0 <= value < 8 for value in result.values)):
            raise TreeError("the catalogue's node flags are damaged; restore a backup")
        return result

    def copy(self) -> "FlagRuns":
        """An independent copy with nothing touched."""
        result = FlagRuns()
        result.count = self.count
        result.starts = self.starts.copy()
        result.values = self.values.copy()
        return result

    def append(self, n: int, value: int) -> None:
        """Add `n` nodes with the flags `value`."""
        if n and (not self.values or self.values[-1] != value):
            self.starts.append(self.count)
            self.values.append(value)
            self.touched.add(self.count)
        self.count += n
        self._arrays = None

    def assign(self, start: int, stop: int, value: int) -> None:
        """Set the flags of nodes [start, stop), which must exist, to `value`."""
        if start == stop:
            return
        first = bisect_right(self.starts, start) - 1
        after = bisect_left(self.starts, stop)
        end = self.starts[after] if after < len(self.starts) else self.count
        # One more run on either side takes part, so that equal neighbours merge.
        low, high = max(first - 1, 0), min(after + 1, len(self.starts))
        pieces = list(zip(self.starts[low:first], self.values[low:first], strict=True))
        if self.starts[first] < start:
            pieces.append((self.starts[first], self.values[first]))
        pieces.append((start, value))
        if end > stop:
            pieces.append((stop, self.values[after - 1]))
        pieces += zip(self.starts[after:high], self.values[after:high], strict=True)
        merged = [piece for i, piece in enumerate(pieces) if i == 0 or piece[1] != pieces[i - 1][1]]
        self.touched.update(self.starts[low:high])
        self.touched.update(start for start, _ in merged)
        self.starts[low:high] = [start for start, _ in merged]
        self.values[low:high] = [value for _, value in merged]
        self._arrays = None

    def run_at(self, start: int) -> int | None:
        """Flags of the run that starts exactly at node `start`, None when no run does."""
        place = bisect_left(self.starts, start)
        return self.values[place] if place < len(self.starts) and self.starts[place] == start else None

    def at(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Flags of the nodes `index` [n], all inside the count."""
        if self._arrays is None:
            self._arrays = np.array(self.starts, np.int64), np.array(self.values, np.uint8)
        starts, values = self._arrays
        return values[np.searchsorted(starts, index, side="right") - 1]

    def span(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Flags of nodes [start, stop), a fresh array."""
        if start == stop:
            return np.empty(0, np.uint8)
        first, after = bisect_right(self.starts, start) - 1, bisect_left(self.starts, stop)
        edges = np.array([start, *self.starts[first + 1 : after], stop], np.int64)
        return np.repeat(np.array(self.values[first:after], np.uint8), np.diff(edges))

    def extent(self, mask: int, wanted: int) -> int:
        """One past the last node whose flags under `mask` equal `wanted`; 0 when there is none."""
        end = self.count
        for start, value in zip(reversed(self.starts), reversed(self.values), strict=True):
            if value & mask == wanted:
                return end
            end = start
        return 0
