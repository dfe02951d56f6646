"""Focus maps as text and as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checks import words

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.focus_map import FocusFrame, FocusMap
from mc_runtime.timeline import Entries


def frame(label: str, levels: list[int], index: list[int]) -> FocusFrame:
    entries = Entries(np.array(levels, np.int8), np.array(index, np.int64), 8)
    return FocusFrame(label, entries, entries.stop)


# 8 tokens, a block, a node of 64 after 6 blocks, 4 tokens: 132 in all.
FRAME = frame("who?", [0] * 8 + [1] * 7 + [2] + [0] * 4, [*range(8), *range(1, 8), 1, *range(128, 132)])


def test_columns_show_the_finest_level_in_them() -> None:
    assert FRAME.length == 132
    every_token = FRAME.levels(132)
    assert every_token.tolist() == [0] * 8 + [1] * 56 + [2] * 64 + [0] * 4
    assert FRAME.levels(3).tolist() == [0, 1, 0]
    assert FRAME.levels(1).tolist() == [0]
    assert FRAME.levels(1000).min() == 0
    assert len(FRAME.levels(1000)) == 1000
    partly = FocusFrame("", FRAME.entries, 264)  # text that has come since is not shown yet
    assert np.isnan(partly.levels(4)).tolist() == [False, False, True, True]
    padded = FRAME.levels(2, span=264)
    assert padded[0] == 0
    assert np.isnan(padded[1])


def test_text() -> None:
    short = frame("first", [0] * 33, list(range(33)))
    lines = FocusMap([short, FRAME]).text(columns=12).splitlines()
    assert lines[0] == "███" + " " * 9 + "  first"
    assert lines[1] == "█▓▓▓▓▓▒▒▒▒▒█  who?"
    assert len(lines) == 3
    assert "█ level 0" in lines[2]
    assert "· coarser" in lines[2]
    deep = FocusMap([frame("deep", [6], [0])])
    assert deep.text(columns=3).startswith("···")


def test_a_label_is_one_short_line() -> None:
    """A prompt may be a page of text."""
    long = frame("Read this:\n\n" + "the sea and the wind\n" * 50, [0] * 33, list(range(33)))
    lines = FocusMap([long, FRAME]).text(columns=12).splitlines()
    assert len(lines) == 3
    label = lines[0][14:]
    assert label.startswith("Read this: the sea and the wind the sea")
    assert label.endswith(" ...")
    assert len(label) <= 80


def test_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = FocusMap([frame("first [x] $y$", [0] * 33, list(range(33))), FRAME]).save_png(
        tmp_path / "map.png", title="T"
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5_000
    FocusMap([frame("deep", [6], [0])]).save_png(tmp_path / "deep.png")
    FocusMap([frame("flat", [0], [0])]).save_png(tmp_path / "flat.png")


def test_no_turns_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="generate first"):
        FocusMap().save_png(tmp_path / "map.png")
    assert FocusMap().text().startswith("█ level 0")


def test_the_map_of_a_session(memory: Callable[..., Session], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    session = memory()
    with pytest.raises(InputError, match="generate first"):
        session.focus_map().save_png(tmp_path / "none.png")
    session.ingest(words(600))
    session.generate("what of the dog?", max_new_tokens=5)
    text = session.focus_map().text(columns=60)
    assert "what of the dog?" in text
    assert "▓" in text
    session.focus_map().save_png(tmp_path / "map.png")
    session.close()
    assert "what of the dog?" in session.focus_map().text()
