"""Ways to keep a long past in few slots, ours and others', behind one interface."""

from __future__ import annotations

from typing import Protocol

from ..pasts import Kept, Past


class Rival(Protocol):
    """name: as the tables show it. keep: fill exactly `slots` slots (beyond the sink) from `past.far` tokens."""

    name: str

    def keep(self, past: Past, slots: int) -> Kept: ...
