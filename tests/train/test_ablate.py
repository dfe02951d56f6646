"""Ablations: what is changed, what stays the same, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.ablate import HeldOut, held_out_losses, parse_variant
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_start import GistSettings, make_task


def test_variants_are_parsed() -> None:
    base = GistSettings(teacher=0.5)
    assert parse_variant("recon=0.1", base).settings == GistSettings(teacher=0.5, reconstruct=0.1)
    several = parse_variant("kind=embedding, layers=0,lr=2e-3", base)
    assert several.settings == GistSettings(kind="embedding", layers=0, teacher=0.5)
    assert several.lr == 2e-3
    assert parse_variant("curriculum=0.2:0.3", base).settings.curriculum == (0.2, 0.3)
    assert parse_variant("levels=2,train_levels=1:2", base).settings.train_levels == (1, 2)
    assert parse_variant("kind=projected,keep_vectors=true", base).settings.keep_vectors
    for bad in ("layers", "depth=2", "layers=x", "layers=1", "keep_vectors=maybe", "curriculum=1"):
        with pytest.raises(InputError):
            parse_variant(bad, base)


def test_held_out_samples_are_fixed(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """The same micro-batches for every task, whatever its kind and its own options."""
    held = HeldOut([corpus("a"), corpus("b")], n=3, far=32, near=8, tokens=80)
    net = GistNet.untrained(model.decoder, 8)
    settings = [
        GistSettings(block_size=8), GistSettings(block_size=8, reconstruct=1.0), GistSettings(block_size=8, gists=4),
        GistSettings(block_size=8, kind="embedding", width=64),
    ]  # fmt: skip
    tasks = [make_task(model.decoder, [corpus("c")], s, net) for s in settings]
    one, same, four, embedding = (held_out_losses(task, held) for task in tasks)
    assert set(one) == {"a", "b"}
    assert not np.allclose(one["a"]["nll"], one["b"]["nll"])
    for text in one:
        assert np.array_equal(one[text]["loss"], same[text]["loss"])
        assert not np.allclose(one[text]["loss"], four[text]["loss"])
        assert not np.allclose(one[text]["loss"], embedding[text]["loss"])
        # Gists that say nothing at all leave the near tokens' own likelihood: all arms are close to each other.
        assert one[text]["nll"] == pytest.approx(four[text]["nll"], rel=0.2)


def test_command(
    tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus("text")
    corpus("held")
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    out = tmp_path / "report.json"
    arguments = [
        "train", "ablate", tmp_path / "text.txt", "--held", tmp_path / "held.txt", "--run", tmp_path / "run",
        "--out", out,
        "--base", "block_size=8,tokens=512", "--steps", 2, "--accumulate", 1, "-n", 3, "--far", 64, "--tokens", 512,
        "-v", "gists=2", "-v", "kind=embedding,width=64,layers=0", "-v", "block_size=16",
    ]  # fmt: skip
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "gists=2" in result.output
    variants = {v["name"]: v for v in json.loads(out.read_text())["variants"]}
    assert list(variants) == ["base", "gists=2", "kind=embedding,width=64,layers=0", "block_size=16"]
    base, two = variants["base"]["held"]["held"], variants["gists=2"]["held"]["held"]
    assert two["against_base"] == pytest.approx(two["loss"] - base["loss"])
    assert two["against_base"] != 0
    assert "against_base" not in variants["block_size=16"]["held"]["held"]
    assert variants["kind=embedding,width=64,layers=0"]["settings"]["layers"] == 0
    assert all(v["steps"] == 2 and v["parameters"] > 0 for v in variants.values())
    # Trained runs are not trained again.
    before = (tmp_path / "run" / "base" / "log.jsonl").read_text()
    CliRunner().invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert (tmp_path / "run" / "base" / "log.jsonl").read_text() == before
    again = {v["name"]: v for v in json.loads(out.read_text())["variants"]}
    assert again["base"]["held"] == variants["base"]["held"]
