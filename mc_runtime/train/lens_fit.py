"""From texts to a LensNet: label scenes into a folder, fit the net to them, and judge it on scenes kept apart."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.ranks import spearman

from .corpus import Corpus
from .lens_questions import Article
from .lens_samples import LensExample, SampleOptions, draw_scene, example_of, load_samples, save_samples
from .lens_start import fit_head
from .lens_task import LensTask, LensTaskOptions, score
from .trainer import Trainer, TrainOptions

# One scene of so many is kept apart, to judge the net by.
HELD_OUT = 12


def label_scenes(
    folder: Path,
    model: LoadedModel,
    net: GistNet,
    corpora: Sequence[Corpus],
    articles: list[Article],
    scenes: int,
    seed: int,
    *,
    minutes: float | None = None,
    options: SampleOptions | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Label scenes 0 to `scenes` - 1, a file each, but those that are there already. A scene depends on its number and
    the seed alone. Under torchrun every process labels its share."""
    folder.mkdir(parents=True, exist_ok=True)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    begin = time.monotonic()
    for number in range(rank, scenes, world):
        if minutes is not None and time.monotonic() - begin > 60 * minutes:
            break
        path = folder / f"{number:06d}.safetensors"
        if not path.exists():
            rng = random.Random(f"{seed} {number}")
            save_samples(draw_scene(rng, model, net, corpora, articles, options or SampleOptions()), path)
        progress(number + 1)
    if world > 1:
        dist.barrier()


def examples_of(paths: Sequence[Path], model: LoadedModel, net: GistNet, lensnet: LensNet) -> Iterator[LensExample]:
    """What the net is given and should say in each context of the files."""
    for sample in load_samples(paths):
        yield example_of(sample, model, net, lensnet.mu)


def fit_lens(
    run: Path,
    model: LoadedModel,
    net: GistNet,
    lensnet: LensNet,
    options: TrainOptions,
    task_options: LensTaskOptions,
    on_step: Callable[[dict[str, Any]], None] = lambda _: None,
) -> tuple[LensNet, list[LensExample]]:
    """Train on the labels in `run`, an untrained net from a head that is fitted to the features; returns the moving
    average of the net and the contexts that it has not seen."""
    paths = sorted((run / "labels").glob("*.safetensors"))
    if len(paths) < 2:
        raise InputError(f"{run}: expected at least two labelled scenes, found {len(paths)}")
    apart = paths[:: max(2, min(HELD_OUT, len(paths)))]
    train = [path for path in paths if path not in set(apart)]
    examples, weights = list(examples_of(train, model, net, lensnet)), lensnet.weights
    if not weights.head_out.any():
        weights = fit_head(weights, examples, task_options, options.seed)
    task = LensTask(weights, examples, task_options)
    trainer = Trainer(task, run, options)
    trainer.run(on_step)
    fitted = LensNet(task.weights(trainer.averaged()), lensnet.mu)
    return fitted, list(examples_of(apart, model, net, lensnet))


@torch.no_grad()
def report_fit(net: LensNet, examples: Sequence[LensExample]) -> list[str]:
    """Rank correlation of scores with gate labels, per context, on continuations and on questions."""
    lines = []
    for name, of_question in (("continuations", False), ("questions", True)):
        chosen = [one for one in examples if one.asks == of_question]
        found: list[list[float]] = [[], []]
        for one in chosen:
            scores = score(one, net.weights).double().cpu().numpy()
            labels = one.labels.double().cpu().numpy()
            for column in range(2):
                known = np.isfinite(labels[:, column])
                found[column].append(spearman(scores[known, column], labels[known, column]))
        if chosen:
            gain, cost = (float(np.nanmean(x)) if np.isfinite(x).any() else float("nan") for x in found)
            lines.append(
                f"{name}: rank correlation with labels {gain:.2f} (gain), {cost:.2f} (cost), n = {len(chosen)}"
            )
    return lines
