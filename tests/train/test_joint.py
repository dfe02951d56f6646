"""Training in turn: labels follow the gists, what is no better is thrown away, and a run can be gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.train.ablate import HeldOut
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.gist_start import GistSettings
from mc_runtime.train.joint import ROUNDS, JointOptions, train_jointly
from mc_runtime.train.lens_samples import SampleOptions
from mc_runtime.train.trainer import TrainOptions

K = 8
SMALL = {"width": 32, "n_heads": 2, "ffn_dim": 32, "head_dim": 16}
SAMPLES = SampleOptions(lengths=(64,), recent=32, targets=16, tokens=192, questions=0.0)


def run(
    folder: Path, model: LoadedModel, corpora: list[Corpus], held: Corpus, *, least: float, rounds: int = 2
) -> tuple[GistNet, LensNet, GistNet, LensNet, list]:
    settings = GistSettings(block_size=K, tokens=256)
    options = JointOptions(
        rounds,
        6,
        TrainOptions(steps=3, lr=3e-2, warmup=1, accumulate=1, ema=0.5),
        TrainOptions(steps=10, lr=1e-2, warmup=1, accumulate=1, ema=0.5),
        least_gist=least,
        least_lens=least,
    )
    gistnet, lensnet = GistNet.untrained(model.decoder, K), LensNet.untrained(model.decoder, **SMALL)
    held_out = HeldOut([held], n=2, far=64, near=32, tokens=192)
    new_gists, new_lens, done = train_jointly(
        folder, model, corpora, [], held_out, gistnet, lensnet, settings, options, SAMPLES
    )
    return gistnet, lensnet, new_gists, new_lens, done


def test_rounds_improve_and_are_written_down(
    model: LoadedModel, corpus: Callable[[str], Corpus], tmp_path: Path
) -> None:
    gistnet, _, new_gists, _, done = run(tmp_path, model, [corpus("a")], corpus("held"), least=-10.0)
    assert [one.number for one in done] == [0, 1]
    assert all(one.gist_kept and one.lens_kept for one in done)
    assert done[1].gist_loss[0] == pytest.approx(done[0].gist_loss[1], abs=1e-4), "a round starts where the last ended"
    assert not torch.equal(new_gists.pool_weights[0].w, gistnet.pool_weights[0].w)
    lines = [json.loads(line) for line in (tmp_path / ROUNDS).read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1]
    first, second = ((tmp_path / f"round-{i}" / "labels" / "000000.safetensors").read_bytes() for i in range(2))
    assert first != second, "labels are made anew"


def test_what_is_no_better_is_thrown_away(model: LoadedModel, corpus: Callable[[str], Corpus], tmp_path: Path) -> None:
    gistnet, lensnet, new_gists, new_lens, done = run(
        tmp_path, model, [corpus("a")], corpus("held"), least=10.0, rounds=3
    )
    assert len(done) == 1, "it stops when neither gets better"
    assert not done[0].gist_kept
    assert not done[0].lens_kept
    assert new_gists is gistnet
    assert new_lens is lensnet


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    model: LoadedModel, corpus: Callable[[str], Corpus], tmp_path: Path
) -> None:
    *_, straight, _, _ = run(tmp_path / "a", model, [corpus("a")], corpus("held"), least=-10.0)
    run(tmp_path / "b", model, [corpus("a")], corpus("held"), least=-10.0, rounds=1)
    *_, resumed, _, _ = run(tmp_path / "b", model, [corpus("a")], corpus("held"), least=-10.0)
    for a, b in zip(straight.pool_weights[0].tensors(), resumed.pool_weights[0].tensors(), strict=True):
        torch.testing.assert_close(a, b)
