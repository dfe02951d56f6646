"""The optimisation loop: AdamW with warm-up and cosine decay, gradient accumulation, EMA, exact resume, a log in JSONL.

A run lives in one directory: `state.pt` (everything that a resume needs), `log.jsonl` (a line per step). Stopping at a
checkpoint and resuming gives the numbers that an uninterrupted run gives, on one process; of several, all but the first
go on with new samples.
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

STATE, LOG = "state.pt", "log.jsonl"
BETAS = (0.9, 0.95)


class Task(Protocol):
    """What is trained. parameters: by name, fp32 leaves; those that do not require a gradient are kept as they are."""

    parameters: dict[str, Tensor]

    def loss(self, rng: random.Random) -> tuple[Tensor, dict[str, float]]:
        """Loss of a micro-batch drawn with `rng`, and figures for the log."""
        ...


@dataclass(frozen=True)
class TrainOptions:
    """steps: of the whole schedule. accumulate: micro-batches a step and process. minutes: stop, with a checkpoint,
    after so long. floor: the learning rate's end over its peak. save_every: steps between checkpoints."""

    steps: int = 300
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


def learning_rate(step: int, options: TrainOptions) -> float:
    """Linear warm-up, then a half cosine from lr to floor * lr at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = min(1.0, (step - options.warmup) / max(1, options.steps - options.warmup))
    return options.lr * (options.floor + (1 - options.floor) * 0.5 * (1 + math.cos(math.pi * done)))


class Trainer:
    """Trains a task in a directory; picks up where an earlier run there stopped."""

    def __init__(self, task: Task, directory: Path, options: TrainOptions) -> None:
        self.task, self.directory, self.options = task, directory, options
        self.trained = {name: p for name, p in task.parameters.items() if p.requires_grad}
        if not self.trained:
            raise InputError("task: expected a parameter that requires a gradient, got none")
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=options.lr, betas=BETAS, weight_decay=options.weight_decay
        )
        self.ema = {name: p.detach().clone() for name, p in self.trained.items()}
        self.step = 0
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.rng = random.Random(f"{options.seed} {self.rank}")
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / STATE).exists():
            self._resume()

    def averaged(self) -> dict[str, Tensor]:
        """The moving average of the parameters, bias-free from the start; untrained ones as they are."""
        return {name: self.ema.get(name, p).detach() for name, p in self.task.parameters.items()}

    def run(self, on_step: Callable[[dict[str, Any]], None] = lambda _: None) -> dict[str, Any]:
        """Train to the end of the schedule or of the minutes; returns the last line of the log."""
        begin, line = time.monotonic(), {"step": self.step}
        while self.step < self.options.steps:
            if self.options.minutes is not None and time.monotonic() - begin > 60 * self.options.minutes:
                break
            line = self._one_step()
            on_step(line)
            if self.rank == 0:
                with (self.directory / LOG).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if self.step % self.options.save_every == 0:
                self.save()
        self.save()
        return line

    def _one_step(self) -> dict[str, Any]:
        begin, sums = time.monotonic(), dict[str, float]()
        rate = learning_rate(self.step, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.options.accumulate):
            loss, figures = self.task.loss(self.rng)
            (loss / self.options.accumulate).backward()
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value / self.options.accumulate
        gradients = []
        for p in self.trained.values():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self.world > 1:
                dist.all_reduce(p.grad)
                p.grad /= self.world
            gradients.append(p.grad)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip)
        if not bool(norm.isfinite()):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite")
        self.optimizer.step()
        self.step += 1
        decay = min(self.options.ema, self.step / (self.step + 9))
        for name, p in self.trained.items():
            self.ema[name].lerp_(p.detach(), 1 - decay)
        return {"step": self.step, **sums, "grad_norm": float(norm), "lr": rate, "seconds": time.monotonic() - begin}

    def save(self) -> None:
        """Write the state; a crash while writing leaves the former one."""
        if self.rank != 0:
            return
        state = {
            "step": self.step,
            "options": asdict(self.options),
            "parameters": {name: p.detach() for name, p in self.trained.items()},
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.getstate(),
        }
        partial = self.directory / f"{STATE}.part"
        torch.save(state, partial)
        partial.replace(self.directory / STATE)

    def _resume(self) -> None:
        state = torch.load(self.directory / STATE, weights_only=False)
        if set(state["parameters"]) != set(self.trained):
            raise InputError(f"{self.directory}: holds a run of other parameters; choose another directory")
        for name, p in self.trained.items():
            p.data.copy_(state["parameters"][name])
        self.ema, self.step = state["ema"], state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.rank == 0:
            self.rng.setstate(state["rng"])
        else:
            self.rng = random.Random(f"{self.options.seed} {self.rank} {self.step}")
