"""What pays: the same training with one thing changed, held against the first on the same held-out samples.

All variants train for as many steps on the same texts from the same seed, and are scored by the objective `logits`
without extra losses, all blocks gisted, packed positions. Sample i of a text is the same for every variant of the same
block size, so differences are paired.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.model.decoder import Decoder

from .corpus import Corpus
from .gist_options import GistTaskOptions
from .gist_start import DEFAULT_LR, GistSettings, make_task
from .gist_task import GistTask
from .layouts import LayoutOptions
from .trainer import LOG, STATE, Trainer, TrainOptions

BASE = "base"
# Short names on the command line.
ALIASES = {"recon": "reconstruct"}


@dataclass(frozen=True)
class Variant:
    """name: as it was asked for. settings: of the task. lr: None for the kind's own."""

    name: str
    settings: GistSettings
    lr: float | None = None


def parse_variant(text: str, base: GistSettings) -> Variant:
    """`key=value`, several joined by commas, as `kind=embedding,layers=0`; keys are the names of GistSettings and `lr`.
    A pair is written with a colon: `curriculum=0.2:0.2`. Raises InputError."""
    known = {f.name: f for f in fields(GistSettings)}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        key = ALIASES.get(key.strip(), key.strip())
        if not equals or (key not in known and key != "lr"):
            raise InputError(f"variant: expected key=value with one of {', '.join(known)}, lr, got {part!r}")
        changes[key] = _parse(key, value.strip(), float if key == "lr" else type(known[key].default))
    lr = changes.pop("lr", None)
    return Variant(text, replace(base, **changes), lr)


def _parse(key: str, value: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        if kind is tuple:
            first, second = value.split(":")
            return float(first), float(second)
        if kind is type(None):
            return tuple(int(level) for level in value.split(":"))
        return kind(value)
    except (KeyError, ValueError):
        raise InputError(f"variant: {key} cannot be {value!r}") from None


@dataclass(frozen=True)
class HeldOut:
    """How variants are scored: `n` micro-batches of `tokens` tokens per text, each of `far` tokens as gists and `near`
    tokens behind them."""

    corpora: Sequence[Corpus]
    n: int = 20
    far: int = 512
    near: int = 128
    tokens: int = 4096
    teacher: float = 0.7

    def options(self, levels: int) -> GistTaskOptions:
        """A gist of level 2 stands wherever one fits."""
        layout = LayoutOptions(whole=1.0, sink_block=0.0, level2=1.0 if levels > 1 else 0.0, true_positions=0.0)
        return GistTaskOptions(
            lengths=(self.far,), length_weights=(1.0,), cuts=(1,), near=self.near, tokens=self.tokens,
            teacher=self.teacher, layout=layout,
        )  # fmt: skip


@torch.no_grad()
def held_out_losses(task: GistTask, held: HeldOut) -> dict[str, dict[str, NDArray[np.float64]]]:
    """By text, `loss` and `nll` of each micro-batch, with the task's gists as they are."""
    found = {}
    for corpus in held.corpora:
        scored = GistTask(task.decoder, [corpus], task.maker, held.options(len(task.maker.gists)))
        lines = [scored.loss(random.Random(f"held out {corpus.name} {i}"))[1] for i in range(held.n)]
        found[corpus.name] = {name: np.array([line[name] for line in lines]) for name in ("loss", "nll")}
    return found


@dataclass(frozen=True, eq=False)
class Result:
    """held: as `held_out_losses`. seconds: median of a step. parameters: trained numbers that a file would hold."""

    variant: Variant
    steps: int
    held: dict[str, dict[str, NDArray[np.float64]]]
    seconds: float = 0.0
    parameters: int = 0

    def against(self, base: Result, text: str, name: str = "loss") -> tuple[float, float] | None:
        """Mean difference to the base's, and its standard error; None where the samples are others."""
        if self.variant.settings.block_size != base.variant.settings.block_size:
            return None
        difference = self.held[text][name] - base.held[text][name]
        return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5)

    def to_dict(self, base: Result) -> dict[str, Any]:
        """For JSON: means, standard errors, and the difference to the base."""
        held: dict[str, Any] = {}
        for text, losses in self.held.items():
            held[text] = {name: float(x.mean()) for name, x in losses.items()} | {"n": len(losses["loss"])}
            paired = self.against(base, text)
            if paired is not None:
                held[text] |= {"against_base": paired[0], "standard_error": paired[1]}
        settings = asdict(self.variant.settings)
        return {
            "name": self.variant.name, "settings": settings, "lr": self.variant.lr, "steps": self.steps,
            "seconds_per_step": round(self.seconds, 3), "parameters": self.parameters, "held": held,
        }  # fmt: skip


def run_variant(
    decoder: Decoder,
    corpora: Sequence[Corpus],
    variant: Variant,
    start: GistNet,
    held: HeldOut,
    directory: Path,
    options: TrainOptions,
    say: Callable[[str], None] = lambda _: None,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Result:
    """Train in `directory` (gone on with if it was interrupted) and score the averaged weights.

    steps = 0 scores the start.
    """
    lr = DEFAULT_LR[variant.settings.kind] if variant.lr is None else variant.lr
    task = make_task(
        decoder, corpora, variant.settings, start, resumes=(directory / STATE).exists(), seed=options.seed, say=say
    )
    trainer = Trainer(task, directory, replace(options, lr=lr))
    trainer.run(on_step)
    trained = {name: p for name, p in task.maker.parameters.items() if p.requires_grad}
    for name, x in trainer.averaged().items():
        task.parameters[name].data.copy_(x)
    log = directory / LOG
    seconds = [json.loads(line)["seconds"] for line in log.read_text().splitlines()] if log.exists() else [0.0]
    size = sum(p.numel() for p in trained.values())
    return Result(variant, trainer.step, held_out_losses(task, held), float(np.median(seconds)), size)
