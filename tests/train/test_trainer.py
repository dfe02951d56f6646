"""The loop: it learns, stops, resumes exactly, and several processes give the gradients of one."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_gist_task import K
from test_gist_task import task as gist_task
from tiny import tiny_model
from torch import Tensor
from typer.testing import CliRunner

from mc_runtime import cli
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.plot import draw_losses, smoothed
from mc_runtime.train.trainer import LOG, Task, Trainer, TrainOptions, learning_rate


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


def test_a_schedule_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number of steps the rate falls to its end with the minutes, over a resume as well."""
    now = [100.0]
    monkeypatch.setattr("mc_runtime.train.trainer.time.monotonic", lambda: now[0])
    options = TrainOptions(steps=None, minutes=1.0, lr=1.0, warmup=2, floor=0.1, save_every=1)

    def on_step(line: dict[str, float]) -> None:
        now[0] += 6.0
        if line["step"] == 4:
            raise KeyboardInterrupt

    trainer = Trainer(Quadratic(), tmp_path, options)
    with pytest.raises(KeyboardInterrupt):
        trainer.run(on_step)
    trainer._time_is_up(100.0, 0.0)
    trainer.save()
    now[0] = 5000.0
    Trainer(Quadratic(), tmp_path, options).run(on_step)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    rates = [line["lr"] for line in lines]
    steps = [line["step"] for line in lines]
    assert (steps, rates[:2]) == ([1, 2, 3, *range(5, 12)], [0.5, 1.0])  # the interrupted step's line was not written
    assert rates[2:] == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * s / 10)) for s in (2, *range(4, 11))])
    with pytest.raises(InputError, match="steps"):
        TrainOptions(steps=None)


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


def tiny_task(text: str, cache: str) -> Task:
    """A small gist task that every process can build for itself."""
    model = tiny_model()
    return gist_task(
        model, Corpus.open(Path(text), model.tokenizer, Path(cache)), lengths=(16,), length_weights=(1,), cuts=(2,)
    )


TOGETHER = TrainOptions(steps=4, lr=1e-2, warmup=0, accumulate=2, clip=1e9, save_every=100)


def _process(rank: int, world: int, folder: str) -> None:
    """One step's gradients; then four steps at once, and two and two with a new start between them."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.set_num_threads(1)

    def trainer(name: str) -> Trainer:
        return Trainer(tiny_task(f"{folder}/text.txt", f"{folder}/cache"), Path(folder) / name, TOGETHER)

    whole = trainer("whole")
    whole._one_step()
    gradients = {name: p.grad.clone() for name, p in whole.trained.items() if p.grad is not None}
    whole.run()
    first = trainer("parts")
    first._one_step()
    first._one_step()
    first.save()
    dist.barrier()
    again = trainer("parts")
    started_at = again.step
    again.run()
    torch.save((gradients, whole.averaged(), again.averaged(), started_at), f"{folder}/out{rank}.pt")
    dist.barrier()
    os._exit(0)  # the threads of gloo may outlive what they use when a process ends in the usual way: torch then aborts


def test_two_processes(tmp_path: Path, corpus: Callable[..., Corpus]) -> None:
    """They give the gradients of one process on all their micro-batches, and resume exactly."""
    corpus("text")
    mp.spawn(_process, (2, str(tmp_path)), nprocs=2)
    (g0, whole0, parts0, started), (g1, whole1, parts1, _) = (
        torch.load(tmp_path / f"out{rank}.pt") for rank in range(2)
    )
    assert started == 2
    task = tiny_task(str(tmp_path / "text.txt"), str(tmp_path / "cache"))
    for rank in range(2):
        rng = random.Random(f"{TOGETHER.seed} {rank}")
        for _ in range(TOGETHER.accumulate):
            (task.loss(rng)[0] / (2 * TOGETHER.accumulate)).backward()
    for name, p in task.parameters.items():
        assert p.grad is not None
        assert p.grad.abs().max() > 0
        torch.testing.assert_close(g0[name], p.grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(g0[name], g1[name])
        assert torch.equal(whole0[name], whole1[name])
        assert torch.equal(parts0[name], parts1[name])
        assert torch.equal(whole0[name], parts0[name])
    lines = [json.loads(line)["step"] for line in (tmp_path / "parts" / LOG).read_text().splitlines()]
    assert lines == [3, 4]  # steps taken one by one are not logged


def test_an_older_checkpoint_cuts_the_log(tmp_path: Path) -> None:
    """Steps that are done again are logged once; a line that a crash left unfinished goes too."""
    trainer = Trainer(Quadratic(), tmp_path, OPTIONS)
    trainer.run()
    old = Trainer(Quadratic(), tmp_path / "old", TrainOptions(**(asdict(OPTIONS) | {"steps": 12})))
    old.run()
    (tmp_path / "old" / "state.pt").replace(tmp_path / "state.pt")
    with (tmp_path / LOG).open("a") as file:
        file.write('{"step": 31, "lo')
    again = Trainer(Quadratic(), tmp_path, OPTIONS)
    assert again.step == 12
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    again.run()
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))


def test_a_log_without_a_checkpoint_is_of_no_use(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text('{"step": 1, "loss": 2.0}\n')
    Trainer(Quadratic(), tmp_path, OPTIONS)
    assert (tmp_path / LOG).read_text() == ""


def test_states_of_one_random_number_generator(tmp_path: Path) -> None:
    """What runs of one process wrote before there were several is still read, exactly."""
    whole = Trainer(Quadratic(), tmp_path / "a", OPTIONS)
    whole.run()
    parts = Trainer(Quadratic(), tmp_path / "b", OPTIONS)
    for _ in range(7):
        parts._one_step()
    parts.save()
    state = torch.load(tmp_path / "b" / "state.pt", weights_only=True)
    (state["rng"],) = state.pop("rngs")
    torch.save(state, tmp_path / "b" / "state.pt")
    again = Trainer(Quadratic(), tmp_path / "b", OPTIONS)
    again.run()
    assert torch.equal(whole.task.parameters["x"], again.task.parameters["x"])


def test_steps_are_announced(tmp_path: Path) -> None:
    class Counting(Quadratic):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def begin_step(self, done: float) -> None:
            self.seen.append(done)

    task = Counting()
    Trainer(task, tmp_path, TrainOptions(steps=3)).run()
    assert task.seen == [0, 1 / 3, 2 / 3]


def test_plot(tmp_path: Path) -> None:
    lines = [{"step": i + 1, "loss": 2.0 - 0.01 * i, "nll": 3.0} for i in range(40)]
    (tmp_path / LOG).write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = draw_losses(tmp_path / LOG, tmp_path / "loss.png", "a run")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    line = smoothed([line["loss"] for line in lines])
    assert line[0] == 2.0
    assert lines[-1]["loss"] < line[-1] < line[0]


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
    assert (tmp_path / "run" / "loss.png").exists()
