"""The optimisation loop: AdamW with warm-up and cosine decay, gradient accumulation, EMA, exact resume, a log in JSONL.

A run lives in one directory: `state.pt` (everything that a resume needs), `log.jsonl` (a line per step). Stopping at a
checkpoint and resuming with as many processes gives the numbers that an uninterrupted run gives: the state holds the
random numbers of every process, and log lines of steps that have to be done again are cut off.

Several processes (torch.distributed) draw their own micro-batches and average their gradients. Parameters, optimizer
and EMA are fp32; what the loss computes in is the task's business.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mc_runtime.errors import InputError

from .freed_memory import give_back_freed_memory

STATE, LOG = "state.pt", "log.jsonl"
BETAS = (0.9, 0.95)


class Task(Protocol):
    """What is trained. parameters: by name, fp32 leaves; those that do not require a gradient are kept as they are.

    Optional, looked up by name: `begin_step(done)` is called before each step, with the share of the schedule that is
    done, from 0 to 1.
    """

    parameters: dict[str, Tensor]

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of a micro-batch drawn with `rng` (its only source of chance), and figures for the log."""
        ...


@dataclass(frozen=True)
class TrainOptions:
    """steps: of the whole schedule; None: as many as `minutes` hold, and the learning rate falls with the clock (a
    resume counts the time that was trained before). accumulate: micro-batches a step and process. minutes: stop, with a
    checkpoint, after so long. floor: the learning rate's end over its peak. save_every: steps between checkpoints."""

    steps: int | None = 300
    lr: float = 3e-3
    warmup: int = 10
    floor: float = 0.1
    accumulate: int = 2
    clip: float = 1.0
    ema: float = 0.97
    weight_decay: float = 0.0
    minutes: float | None = None
    save_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise InputError("steps: expected a number, or minutes to hold them, got neither")


def learning_rate(step: int, options: TrainOptions, seconds: float = 0.0) -> float:
    """Linear warm-up over the first steps, then a half cosine from lr to floor * lr at the schedule's end.

    seconds: trained before this step; what the schedule goes by where it has no number of steps.
    """
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    if options.steps is None:
        done = share_done(step, options, seconds)
    else:
        done = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    return options.lr * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def share_done(step: int, options: TrainOptions, seconds: float) -> float:
    """Of the schedule, from 0 to 1."""
    if options.steps is None:
        return min(1.0, seconds / max(1e-9, 60 * (options.minutes or 0.0)))
    return min(1.0, step / max(1, options.steps))


class Trainer:
    """Trains a task in a directory; picks up where an earlier run there stopped."""

    def __init__(self, task: Task, directory: Path, options: TrainOptions) -> None:
        self.task, self.directory, self.options = task, directory, options
        self.trained = {name: p for name, p in task.parameters.items() if p.requires_grad}
        if not self.trained:
            raise InputError("task: expected a parameter that requires a gradient, got none")
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if self.world > 1:
            for p in task.parameters.values():
                dist.broadcast(p.data, 0)  # processes may have computed their start with different rounding
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=options.lr, betas=BETAS, weight_decay=options.weight_decay
        )
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.step, self.seconds = 0, 0.0
        self.rng = random.Random(f"{options.seed} {self.rank}")
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STATE).exists():
            self._resume()
        if self.rank == 0:
            cut_log(directory / LOG, self.step)

    def averaged(self) -> dict[str, Tensor]:
        """The moving average of the parameters, bias-free from the start; untrained ones as they are."""
        return {name: self.ema.get(name, p).detach() for name, p in self.task.parameters.items()}

    def run(self, on_step: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
        """Train to the end of the schedule or of the minutes; returns the last line of the log."""
        line, before, begin = {"step": self.step}, self.seconds, time.monotonic()
        steps = math.inf if self.options.steps is None else self.options.steps
        while self.step < steps and not self._time_is_up(begin, before):
            line = self._one_step()
            on_step(line)
            if self.rank == 0:
                with (self.directory / LOG).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if self.step % self.options.save_every == 0:
                self.save()
                give_back_freed_memory()
        self.save()
        return line

    def _time_is_up(self, begin: float, before: float) -> bool:
        """Sets the seconds trained so far. The first process decides for all: one that went on alone would wait for the
        others for ever. A schedule by the clock counts earlier runs too, one of steps gives every run its minutes."""
        self.seconds = before + time.monotonic() - begin
        if self.options.minutes is None:
            return False
        clock = [self.seconds]
        if self.world > 1:
            dist.broadcast_object_list(clock, 0)
        self.seconds = clock[0]
        return self.seconds - (0.0 if self.options.steps is None else before) > 60 * self.options.minutes

    def _one_step(self) -> dict[str, Any]:
        begin, seen = time.monotonic(), dict[str, list[float]]()
        rate = learning_rate(self.step, self.options, self.seconds)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        begin_step = getattr(self.task, "begin_step", None)
        if begin_step is not None:
            begin_step(share_done(self.step, self.options, self.seconds))
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.options.accumulate):
            loss, figures = self.task.loss(self.rng)
            (loss / self.options.accumulate).backward()
            for name, value in figures.items():
                seen.setdefault(name, []).append(value)
        for p in self.trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.world > 1:
                dist.all_reduce(p.grad)
                p.grad /= self.world
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite")
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.ema, self.step / (self.step + 9))
        for name, p in self.trained.items():
            self.ema[name].lerp_(p.detach(), 1 - decay)
        means = {name: sum(values) / len(values) for name, values in seen.items()}
        return {"step": self.step, **means, "grad_norm": float(norm), "lr": rate, "seconds": time.monotonic() - begin}

    def save(self) -> None:
        """Write the state; a crash while writing leaves the former one. All processes call it together."""
        rngs = [self.rng.getstate()]
        if self.world > 1:
            rngs = rngs * self.world
            dist.all_gather_object(rngs, self.rng.getstate())
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "options": asdict(self.options),
            "parameters": {name: p.detach() for name, p in self.trained.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "rngs": rngs,
        }
        partial = self.directory / f"{STATE}.part"
        torch.save(state, partial)
        partial.replace(self.directory / STATE)

    def _resume(self) -> None:
        state = torch.load(self.directory / STATE, map_location="cpu", weights_only=True)
        if {name: x.shape for name, x in state["parameters"].items()} != {n: p.shape for n, p in self.trained.items()}:
            raise InputError(f"{self.directory}: holds a run of other parameters; choose another directory")
        for name, p in self.trained.items():
            p.data.copy_(state["parameters"][name])
            self.ema[name].copy_(state["ema"][name])
        self.step, self.seconds = state["step"], state.get("seconds", 0.0)
        self.optimizer.load_state_dict(state["optimizer"])
        # Older states hold the first process's alone, as "rng". A process that joins later draws samples of its own.
        rngs = state["rngs"] if "rngs" in state else [state["rng"]]
        if self.rank < len(rngs):
            self.rng.setstate(rngs[self.rank])
        else:
            self.rng = random.Random(f"{self.options.seed} {self.rank} {self.step}")


def cut_log(path: Path, step: int) -> None:
    """Drop the lines after `step`, and a line that a crash left unfinished."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = 0
    for line in lines:
        try:
            known = json.loads(line)["step"] <= step
        except json.JSONDecodeError:
            known = False
        if not known:
            break
        kept += 1
    if kept < len(lines):
        partial = path.with_suffix(".part")
        partial.write_text("".join(lines[:kept]))
        partial.replace(path)
