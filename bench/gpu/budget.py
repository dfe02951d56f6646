"""How long each part of a run on a GPU may take, so that the whole ends in time and no part starves the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import accumulate

# Of the whole time, in this order. What a part leaves over goes to those behind it.
SHARES = {"tests": 0.45, "cases": 0.40, "targets": 0.15}
ENDS = dict(zip(SHARES, accumulate(SHARES.values()), strict=True))


class Budget:
    """Seconds of a whole run that begins now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock, self.begin = seconds, clock, clock()

    @property
    def spent(self) -> float:
        return self.clock() - self.begin

    def left(self, part: str) -> float:
        """Seconds until the part has to have ended; below 0 where it is late."""
        return self.seconds * ENDS[part] - self.spent

    def share(self, part: str) -> float:
        """Seconds that are the part's own."""
        return self.seconds * SHARES[part]
