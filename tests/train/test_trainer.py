"""The loop: it learns, stops, resumes exactly, and several processes give the gradients of one."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_gist_task import K
from test_gist_task import task as gist_task
from torch import Tensor
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.trainer import LOG, Trainer, TrainOptions, learning_rate


class Quadratic:
    """Loss |x - noise|^2 around (1, 2, 3)."""

    def __init__(self) -> None:
        self.parameters = {"x": torch.zeros(3, requires_grad=True), "fixed": torch.ones(2)}

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        noise = torch.tensor([1.0, 2.0, 3.0]) + 0.01 * rng.random()
        loss = (self.parameters["x"] - noise).square().sum()
        return loss, {"loss": float(loss.detach())}


OPTIONS = TrainOptions(steps=30, lr=0.3, warmup=3, accumulate=2, save_every=5)


def test_it_learns_and_averages(tmp_path: Path) -> None:
    trainer = Trainer(Quadratic(), tmp_path, OPTIONS)
    last = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert last == lines[-1]
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    averaged = trainer.averaged()
    assert torch.equal(averaged["fixed"], torch.ones(2))
    assert not torch.equal(averaged["x"], trainer.task.parameters["x"])


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = Trainer(Quadratic(), tmp_path / "a", OPTIONS)
    whole.run()
    parts = Trainer(Quadratic(), tmp_path / "b", OPTIONS)
    for _ in range(7):
        parts._one_step()
    parts.save()
    again = Trainer(Quadratic(), tmp_path / "b", OPTIONS)
    assert again.step == 7
    again.run()
    for name, x in whole.averaged().items():
        assert torch.equal(x, again.averaged()[name])
    assert torch.equal(whole.task.parameters["x"], again.task.parameters["x"])


def test_minutes_stop_it_with_a_checkpoint(tmp_path: Path) -> None:
    options = TrainOptions(steps=30, minutes=0.0)
    trainer = Trainer(Quadratic(), tmp_path, options)
    assert trainer.run() == {"step": 0}
    assert (tmp_path / "state.pt").exists()


def test_refusals(tmp_path: Path) -> None:
    class Other(Quadratic):
        def __init__(self) -> None:
            self.parameters = {"y": torch.zeros(3, requires_grad=True)}

    class Broken(Quadratic):
        def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
            return self.parameters["x"].sum() * float("nan"), {"loss": 0.0}

    Trainer(Quadratic(), tmp_path / "a", OPTIONS).save()
    with pytest.raises(InputError, match="other parameters"):
        Trainer(Other(), tmp_path / "a", OPTIONS)
    broken = Broken()
    with pytest.raises(FloatingPointError, match="step 0"):
        Trainer(broken, tmp_path / "b", OPTIONS).run()
    assert torch.equal(broken.parameters["x"], torch.zeros(3))


def test_schedule() -> None:
    options = TrainOptions(steps=100, lr=1.0, warmup=10, floor=0.1)
    rates = [learning_rate(step, options) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def _process(rank: int, world: int, folder: str) -> None:
    """One step of a task whose loss depends on the process."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)

    class Own(Quadratic):
        def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
            loss = (self.parameters["x"] - torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).square().sum()
            return loss, {"loss": float(loss.detach())}

    trainer = Trainer(Own(), Path(folder) / f"run{rank}", TrainOptions(steps=1, lr=0.1, warmup=0, clip=1e9))
    trainer.run()
    torch.save((trainer.task.parameters["x"].detach(), trainer.task.parameters["x"].grad), f"{folder}/out{rank}.pt")
    dist.barrier()
    os._exit(0)  # the threads of gloo may outlive what they use when a process ends in the usual way: torch then aborts


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(_process, (2, str(tmp_path)), nprocs=2)
    (x0, g0), (x1, g1) = (torch.load(tmp_path / f"out{rank}.pt") for rank in range(2))
    assert torch.equal(x0, x1)
    assert torch.equal(g0, g1)
    x = torch.zeros(3, requires_grad=True)
    both = [(x - torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).square().sum() for rank in range(2)]
    (sum(both) / 2).backward()
    torch.testing.assert_close(g0, x.grad)


def test_gists_learn(tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus]) -> None:
    """On the tiny model the loss on fixed samples falls."""
    task = gist_task(model, corpus(), lengths=(32,), length_weights=(1,), cuts=(2,), tokens=160)

    def fixed() -> float:
        with torch.no_grad():
            return sum(float(task.loss(random.Random(i))[0]) for i in range(5))

    before = fixed()
    Trainer(task, tmp_path, TrainOptions(steps=30, lr=1e-2, accumulate=1)).run()
    assert fixed() < 0.97 * before


def test_command(
    tmp_path: Path, model: LoadedModel, corpus: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus("text")
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "mc"))
    monkeypatch.setattr("mc_runtime.model.load_model", lambda *_: model)
    out = tmp_path / "gist.safetensors"
    arguments = ["train", "gist", str(tmp_path / "text.txt"), "--run", str(tmp_path / "run"), "--out", str(out)]
    result = CliRunner().invoke(cli.app, [*arguments, "--steps", "2"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    weights = load_file(out)
    assert weights["pool1/w"].abs().max() > 0
    assert weights["pool1/b"].shape[-1] == 32
    assert K != 32  # the command trains the default block size
