"""The recipes of docs/engines: every Python block is run, in order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

DOCS = Path(__file__).parents[2] / "docs" / "engines"


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """(line of the block's first line, code)."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)]


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.24"), reason="generate(cache=...) is of 5.24")
def test_transformers_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, names = DOCS / "transformers.md", dict[str, Any]()
    blocks = python_blocks(page)
    assert len(blocks) == 7
    for line, code in blocks:
        exec(compile("\n" * line + code, str(page), "exec"), names)
    assert names["session"].engine.name == "transformers"
