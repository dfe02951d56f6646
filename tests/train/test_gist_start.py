"""From settings and a start to a task; the command for each kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_gist_makers import maker_of
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model import LoadedModel
from mc_runtime.train import gist_start
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_start import GistSettings, make_task
from mc_runtime.train.pooled_maker import PooledMaker

K = 8
NARROW: dict[str, Any] = {"block_size": K, "width": 64, "layers": 1}


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "mean"}, {"levels": 3}, {"block_size": 12}, {"gists": 3}, {"gists": 0},
        {"kind": "embedding", "gists": 2}, {"layers": 0}, {"rank": 8}, {"kind": "embedding", "rank": 8},
        {"kind": "projected", "width": 100},
        {"kind": "projected", "ridge_blocks": 10}, {"teacher": 1.5}, {"kind": "embedding", "keep_vectors": True},
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        GistSettings(**settings)


def test_a_trained_gist_starts_several(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """What one gist per block has learnt goes into each of four; only the bias tells them apart."""
    maker = maker_of("pooled", model, noise=0.1)
    start = maker.install(GistNet.untrained(model.decoder, K), maker.parameters)
    settings = GistSettings(block_size=K, gists=4, levels=2)
    task = make_task(model.decoder, [corpus()], settings, start)
    assert isinstance(task.maker, PooledMaker)
    one, two = task.maker.weights()
    assert (one.n_gists, one.block_size, two.n_gists, two.block_size) == (4, K, 4, 4 * K)
    assert torch.equal(one.m, start.pool_weights[0].m)
    for g in range(4):
        assert torch.equal(one.w[:, :, g], start.pool_weights[0].w[:, :, 0])
        own = slice(2 * g, 2 * g + 2)
        assert torch.equal(one.b[:, :, g, own], start.pool_weights[0].b[:, :, 0, own])
    assert two.m.abs().max() == 0
    with pytest.raises(InputError, match="to start from has 4"):
        make_task(
            model.decoder, [corpus()], GistSettings(block_size=K, gists=2),
            task.maker.install(start, task.parameters),
        )  # fmt: skip


def test_train_levels(model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    settings = GistSettings(block_size=K, levels=2, train_levels=(2,))
    task = make_task(model.decoder, [corpus()], settings, GistNet.untrained(model.decoder, K))
    assert {n for n, p in task.parameters.items() if p.requires_grad} == {f"pool2/{f}" for f in "wbmc"}


def test_one_kind_goes_on_and_the_others_stay(
    model: LoadedModel, corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pooled weights stay while a projector is trained, and serve as its aim; vectors stay where asked."""
    pooled = maker_of("pooled", model, noise=0.1)
    start = pooled.install(GistNet.untrained(model.decoder, K), pooled.parameters)
    said: list[str] = []
    settings = GistSettings(kind="projected", rank=8, ridge_blocks=1000, **NARROW)
    task = make_task(model.decoder, [corpus()], settings, start, say=said.append)
    assert "explains" in said[0]
    net = task.maker.install(start, task.parameters)
    assert net.pool_weights is start.pool_weights
    assert isinstance(net.projector, Projector)
    assert net.encode_weights.width == 64

    # From there on: no new start; the vectors stay although the projector learns.
    net.encode_weights.w_out.data[0, 0] = 0.5
    monkeypatch.setattr(gist_start, "collect", None)
    again = GistSettings(kind="projected", rank=8, keep_vectors=True, **NARROW)
    task = make_task(model.decoder, [corpus()], again, net)
    learns = {n for n, p in task.parameters.items() if p.requires_grad}
    assert learns == {"project/down", "project/up", "project/bias"}
    assert torch.equal(task.parameters["project/up"], net.projector.up)
    task = make_task(model.decoder, [corpus()], GistSettings(block_size=K), net)
    kept = task.maker.install(net, task.parameters)
    assert kept.projector is net.projector
    assert kept.encode_weights is net.encode_weights

    two = maker_of("pooled", model, levels=2, noise=0.1)
    deep = two.install(start, two.parameters)
    assert len(task.maker.install(deep, task.parameters).pool_weights) == 2
    assert task.maker.install(deep, task.parameters).pool_weights[1] is deep.pool_weights[1]
    four = make_task(model.decoder, [corpus()], GistSettings(block_size=K, gists=4), deep)
    assert len(four.maker.install(deep, four.parameters).pool_weights) == 1

    for wrong in (
        {"kind": "projected", "rank": 4, **NARROW}, {"kind": "embedding", **NARROW, "width": 128},
        {"kind": "embedding", **NARROW, "layers": 0},
    ):  # fmt: skip
        with pytest.raises(InputError):
            make_task(model.decoder, [corpus()], GistSettings(**wrong), net)


@pytest.fixture
def train(
    tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    corpus("text")
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)

    def run(name: str, *arguments: object) -> Path:
        out = tmp_path / f"{name}.safetensors"
        given = ["train", "gist", tmp_path / "text.txt", "--run", tmp_path / name, "--out", out, "--accumulate", 1]
        result = CliRunner().invoke(cli.app, [str(a) for a in (*given, *arguments)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return out

    return run


SHORT = ("--block-size", K, "--tokens", 512, "--steps", 2)


def test_all_kinds_into_one_file(train: Callable[..., Path], tmp_path: Path, model: LoadedModel) -> None:
    pooled = train("pooled", *SHORT, "--reconstruct", 0.1, "--contrast", 0.1)
    narrow = ("--width", 64, "--layers", 1)
    narrow += ("--ridge-blocks", 1000)
    both = train("both", *SHORT, "--kind", "projected", "--rank", 8, "--start", pooled, *narrow)
    a, b = load_file(pooled), load_file(both)
    assert {x.dtype for x in (*a.values(), *b.values())} == {torch.bfloat16}
    assert a["pool1/w"].abs().max() > 0
    for name in a:
        if name.startswith("pool"):
            assert torch.equal(a[name], b[name])
    assert b["project/down"].shape == (8, model.config.embed_dim)
    assert not any(name.startswith("aux") for name in (*a, *b))
    net = GistNet.load(both, model.decoder, K)
    assert isinstance(net.projector, Projector)
    # A finished run has nothing left to do; its ridge start is not made again, its weights are read from the state.
    again = train("both", *SHORT, "--kind", "projected", "--rank", 8, "--start", pooled, *narrow)
    assert all(torch.equal(x, b[name]) for name, x in load_file(again).items())


def test_projected_gists_are_trained_at_the_weight_of_the_file(train: Callable[..., Path]) -> None:
    """A memory weighs gists of both kinds alike: by what the file says, which the training of a projector keeps."""
    pooled = train("pooled", *SHORT, "--gist-bias", -1)
    narrow = ("--width", 64, "--layers", 0, "--rank", 8, "--ridge-blocks", 1000, "--keep-vectors")
    made = {}
    for name, more in (("kept", ()), ("other", ("--gist-bias", 0))):
        path = train(name, *SHORT, "--kind", "projected", "--start", pooled, *narrow, *more)
        with safe_open(path, "pt") as file:
            made[name] = float(file.metadata()["gist_bias"]), file.get_tensor("project/up")
    assert [bias for bias, _ in made.values()] == [-1.0, 0.0]
    assert not torch.equal(made["kept"][1], made["other"][1])


def test_other_shapes(train: Callable[..., Path], model: LoadedModel) -> None:
    four = load_file(train("four", *SHORT, "--gists-per-block", 4, "--curriculum", 0, 0))
    assert four["pool1/w"].shape[2] == 4
    embedding = load_file(
        train("embedding", *SHORT, "--kind", "embedding", "--width", 64, "--layers", 0, "--objective", "hidden:2",
              "--curriculum", 0.5, 0)
    )  # fmt: skip
    assert embedding["encode/w_out"].abs().max() > 0
    two = load_file(train("two", *SHORT[:2], "--tokens", 1200, "--steps", 1, "--levels", 2, "--train-levels", 2))
    assert two["pool1/m"].abs().max() == 0
    assert two["pool2/m"].abs().max() > 0
