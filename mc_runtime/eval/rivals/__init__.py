"""Ways to keep a long past in few slots, ours and others', behind one interface, one file each.

How slots are counted: the first token (the sink, without which a frozen model breaks) is there in every arm and is no
slot; so are the recent tokens. `slots` is how many entries each layer may attend to beyond them, at any query; a rival
that looks back in some layers only may spend there what the others leave. So no rival ever attends to more than
slots x layers entries, and all of `far` is kept with slots = far - 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from ..pasts import Kept, Past, hidden_after


class Rival(Protocol):
    """name: as the tables show it. ours: whether it is part of this project. anew: whether it keeps the whole text (or
    its K/V) aside and chooses from it again while the text goes on, so that what all tokens see together exceeds the
    slots by far."""

    @property
    def name(self) -> str: ...

    @property
    def ours(self) -> bool: ...

    @property
    def anew(self) -> bool: ...

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        """Final hidden states [B, recent + targets, E] of what follows the far tokens, which see of those what fits in
        `slots`. What a target sees may depend on the tokens before it, never on itself or on later ones.

        packed: kept entries stand at their rank; else where they stood in the text.
        """
        ...


class KeepingRival(ABC):
    """A rival that chooses once, from the far and the recent tokens, what is kept for all that follows."""

    name: str
    ours, anew = False, False

    @abstractmethod
    def keep(self, past: Past, slots: int) -> Kept:
        """Fill at most `slots` slots."""

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        return hidden_after(past, self.keep(past, slots), packed=packed)
