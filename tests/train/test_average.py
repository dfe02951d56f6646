"""The mean of several runs' weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.train.average import mean_of_files


def write(path: Path, value: float, *, shape: tuple[int, ...] = (2, 3), about: str = "-1.0") -> Path:
    tensors = {"pool1/m": torch.full(shape, value, dtype=torch.bfloat16), "pool1/b": torch.full((4,), -value)}
    save_file(tensors, str(path), {"gist_bias": about})
    return path


def test_the_mean_in_the_dtypes_of_the_files(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.safetensors", value) for i, value in enumerate((1.0, 2.0, 6.0))]
    out = tmp_path / "mean.safetensors"
    result = CliRunner().invoke(
        cli.app, ["train", "average", *map(str, files), "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    mean = load_file(out)
    assert torch.equal(mean["pool1/m"], torch.full((2, 3), 3.0, dtype=torch.bfloat16))
    assert torch.equal(mean["pool1/b"], torch.full((4,), -3.0))
    with safe_open(str(out), "pt") as file:
        assert file.metadata() == {"gist_bias": "-1.0"}


def test_refusals(tmp_path: Path) -> None:
    first = write(tmp_path / "a.safetensors", 1.0)
    with pytest.raises(InputError, match="at least 2"):
        mean_of_files([first])
    for other in (
        write(tmp_path / "b.safetensors", 1.0, shape=(3, 2)),
        write(tmp_path / "c.safetensors", 1.0, about="0"),
    ):
        with pytest.raises(InputError, match="same parts"):
            mean_of_files([first, other])
    broken = tmp_path / "d.safetensors"
    broken.write_text("no")
    for other in (broken, tmp_path / "missing"):
        with pytest.raises(InputError, match="not a readable"):
            mean_of_files([first, other])
    out = tmp_path / "mean.safetensors"
    bad = write(tmp_path / "e.safetensors", float("nan"))
    result = CliRunner().invoke(cli.app, ["train", "average", str(first), str(bad), "--out", str(out)])
    assert result.exit_code != 0
    assert not out.exists()
