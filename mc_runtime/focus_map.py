"""Focus maps: which part of the history stands in the context in what detail, turn by turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten

import numpy as np
from numpy.typing import NDArray

from .errors import InputError
from .printable import printable
from .timeline import Entries

# Finest first: tokens, blocks, blocks of blocks, ...
SHADES = "█▓▒░·"
# Longest label beside a line, in characters: a prompt may be a page of text.
LABEL = 80


@dataclass(frozen=True)
class FocusFrame:
    """One layout. label: what it was for; entries: what stood in the context; length: tokens of history."""

    label: str
    entries: Entries
    length: int

    def levels(self, columns: int, span: int | None = None) -> NDArray[np.float64]:
        """[columns]: finest level shown within each of `columns` equal parts of `span` tokens (by default the whole
        history); NaN beyond what the entries cover."""
        edges = np.linspace(0, span or self.length, columns + 1)
        starts = self.entries.starts
        result = np.full(columns, np.nan)
        for i in range(columns):
            if edges[i] < self.entries.stop:
                first = np.searchsorted(starts, edges[i], side="right") - 1
                last = np.searchsorted(starts, edges[i + 1], side="left")
                result[i] = self.entries.levels[max(first, 0) : max(last, first + 1)].min()
        return result


@dataclass
class FocusMap:
    """The frames of a session, oldest first; `documents`: (start, title) of what the history is made of."""

    frames: list[FocusFrame] = field(default_factory=list)
    documents: list[tuple[int, str]] = field(default_factory=list)

    def text(self, columns: int = 96) -> str:
        """One line per frame, finest level per column as a shade."""
        if columns < 1:
            raise InputError(f"columns: expected at least 1, got {columns!r}")
        lines = []
        for frame in self.frames:
            levels = frame.levels(columns, max(f.length for f in self.frames))
            shades = (" " if np.isnan(x) else SHADES[min(int(x), len(SHADES) - 1)] for x in levels)
            lines.append(f"{''.join(shades)}  {printable(shorten(frame.label, LABEL, placeholder=' ...'))}")
        legend = "  ".join(f"{shade} level {level}" for level, shade in enumerate(SHADES[:-1]))
        return "\n".join([*lines, f"{legend}  {SHADES[-1]} coarser"])

    def save_png(self, path: Path | str, *, title: str = "Where the memory looks") -> Path:
        """Draw the frames: history from left to right, turns from top to bottom, detail as colour."""
        if not self.frames:
            raise InputError("focus map: no turn to draw yet; generate first")
        from .focus_plot import draw_focus_map  # matplotlib is an extra and slow to import

        return draw_focus_map(self, Path(path), title)
