"""JAX stays as it is when the search's library, which would run it, is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mc_runtime.hidden import hidden

# Says that it was imported, and that it was run.
JAX = {"__init__.py": "print('jax imported')\n", "lax.py": "def top_k(*_):\n    print('jax ran')\n"}


def printed(tmp_path: Path, code: str) -> str:
    """What a process that finds that `jax` prints."""
    folder = tmp_path / "jax"
    folder.mkdir()
    for name, text in JAX.items():
        (folder / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["mc_runtime.retrieval", "mc_runtime.eval.readers.bm25"])
def test_the_search_imports_no_jax(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}\nassert 'bm25s' in sys.modules and 'jax' not in sys.modules\nimport jax"
    assert printed(tmp_path, code) == "jax imported\n"  # at the end, by the user's own import


def test_the_search_runs_no_jax_that_is_imported(tmp_path: Path) -> None:
    code = "import jax.lax as before, mc_runtime.retrieval, jax.lax as after\nassert before is after"
    assert printed(tmp_path, code) == "jax imported\n"


def test_all_is_as_it_was_after_an_error() -> None:
    import json.decoder

    with pytest.raises(ImportError), hidden("json"):
        import json.decoder
    assert sys.modules["json"] is json
    assert sys.modules["json.decoder"] is json.decoder
    with hidden("surely_no_module"):
        pass
    assert "surely_no_module" not in sys.modules
