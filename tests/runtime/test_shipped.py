"""Which weights a choice means."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.shipped import CHECKPOINTS, FILES, gistnet_file, lensnet_file

OPTIONS = {"budget": 256, "block_size": 8, "recent_tokens": 32, "ingest_chunk": 128, "ingest_window": 128}


def test_files_of_every_model_are_there() -> None:
    for files in FILES.values():
        for name in files:
            assert name is None or (CHECKPOINTS / name).is_file()


def test_a_choice_of_gists() -> None:
    known = next(iter(FILES))
    assert gistnet_file("shipped", known, 32) == CHECKPOINTS / FILES[known][0]
    assert gistnet_file("shipped", known, 16) is None
    assert gistnet_file("shipped", "another model", 32) is None
    assert gistnet_file("untrained", known, 32) is None
    assert gistnet_file(None, known, 32) is None
    assert gistnet_file("a/file.safetensors", known, 32) == Path("a/file.safetensors")


def test_lensnet_is_named_or_shipped() -> None:
    assert lensnet_file("mine.safetensors", "another model") == Path("mine.safetensors")
    with pytest.raises(InputError, match="no weights for this model"):
        lensnet_file(None, "another model")


def test_a_model_without_shipped_weights_has_untrained_gists(tmp_path: Path) -> None:
    model = tiny_model()
    with Session.open(tmp_path / "a", model, gistnet="shipped", **OPTIONS) as session:
        shipped = session.tree.spec.gistnet
    with Session.open(tmp_path / "b", model, gistnet="untrained", **OPTIONS) as session:
        assert session.tree.spec.gistnet == shipped
