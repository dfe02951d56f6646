"""The recipes for other engines' caches, docs/engines: every code block runs, and what they assert holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "engines"
ENGINES = ("flashinfer", "llama_cpp", "lmcache", "sglang", "tensorrt_llm", "vllm")
# They run the engine itself, and have tests of their own.
WITH_ENGINES = ("transformers", "vllm-engine")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line of its first line, text) of every Python block."""
    text = path.read_text()
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text)]


def run(path: Path) -> dict[str, Any]:
    """The blocks of a file, one after the other, as one module; errors show the file's own lines."""
    names: dict[str, Any] = {"__name__": path.stem}
    for line, block in blocks(path):
        exec(compile("\n" * line + block, str(path), "exec"), names)
    return names


def test_every_recipe_is_run() -> None:
    assert sorted(p.stem for p in FOLDER.glob("*.md") if p.stem != "README") == sorted((*ENGINES, *WITH_ENGINES))


@pytest.mark.parametrize("engine", ENGINES)
def test_recipe(engine: str) -> None:
    torch.manual_seed(0)
    path = FOLDER / f"{engine}.md"
    source = path.read_text()
    assert len(blocks(path)) == source.count("```python") >= 2
    assert re.search(r"^ *(assert |torch\.testing\.assert_close|check\()", source, re.MULTILINE)
    names = run(path)
    assert names["after"] == [*range(40), 100, *range(72, 100)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_splice_fails_its_recipe(engine: str, tmp_path: Path) -> None:
    """The checks see what they should: without the rotation of the tail none of them holds."""
    source = (FOLDER / f"{engine}.md").read_text()
    wrong = source.replace("import Edit, PageTable, RopeSpec, SplicePlan, kv_splice_", "import *").replace(
        "from mc_kernels.rope import apply_rope\n",
        "from mc_kernels.rope import apply_rope\n\nright = kv_splice_\n\n"
        "def kv_splice_(k, v, k_new, v_new, plan, rope=None, *, positions=None, new_positions=None, **more):\n"
        "    right(k, v, k_new, v_new, plan, **more)\n",
    )
    assert wrong != source
    path = tmp_path / f"{engine}.md"
    path.write_text(wrong)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        run(path)
