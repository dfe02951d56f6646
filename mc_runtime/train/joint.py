"""GistNet and LensNet in turn, until neither gets better.

What a gist keeps decides what is worth opening, and so what LensNet should say: after each phase of GistNet the labels
are made anew. A phase that does not improve its figure on what was kept apart is thrown away, so that the nets that
come out are never worse than those that went in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from mc_runtime.gistnet import GistNet
from mc_runtime.lensnet import LensNet
from mc_runtime.model import LoadedModel
from mc_runtime.ranks import spearman

from .ablate import HeldOut, held_out_losses
from .corpus import Corpus
from .gist_start import GistSettings, make_task
from .lens_fit import fit_lens, label_scenes
from .lens_questions import Article
from .lens_samples import LensExample, SampleOptions
from .lens_task import LensTaskOptions, score
from .trainer import Trainer, TrainOptions

ROUNDS = "rounds.jsonl"


@dataclass(frozen=True)
class JointOptions:
    """rounds: at most. scenes: labelled anew in each. gist, lens: of their phases. least_gist: nats by which the
    held-out loss must fall, least_lens: by which the rank correlation must rise, for a phase to count."""

    rounds: int
    scenes: int
    gist: TrainOptions
    lens: TrainOptions
    least_gist: float = 0.002
    least_lens: float = 0.005
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """gist_loss: of the held-out texts, lens_rank: correlation with labels of scenes kept apart; each before and after
    the phase, and whether its result was kept."""

    number: int
    gist_loss: tuple[float, float]
    gist_kept: bool
    lens_rank: tuple[float, float]
    lens_kept: bool


@torch.no_grad()
def rank_correlation(net: LensNet, examples: Sequence[LensExample]) -> float:
    """Mean over contexts, of scores with gate labels of gains; 0 for a net that tells nothing apart."""
    values = []
    for one in examples:
        labels = one.labels[:, 0].double().cpu().numpy()
        known = np.isfinite(labels)
        value = spearman(score(one, net.weights)[:, 0].double().cpu().numpy()[known], labels[known])
        values.append(0.0 if np.isnan(value) else value)
    return float(np.mean(values))


def train_jointly(
    run: Path,
    model: LoadedModel,
    corpora: Sequence[Corpus],
    articles: list[Article],
    held: HeldOut,
    gistnet: GistNet,
    lensnet: LensNet,
    settings: GistSettings,
    options: JointOptions,
    samples: SampleOptions | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[GistNet, LensNet, list[Round]]:
    """Alternate in `run`, a folder per round; goes on in the round in which an earlier run stopped, from its
    checkpoints. Returns the best nets and what each round did; `rounds.jsonl` says the same."""
    done: list[Round] = []
    for number in range(options.rounds):
        folder = run / f"round-{number}"
        gistnet, before, after, kept = _gist_phase(folder / "gist", model, corpora, held, gistnet, settings, options)
        say(f"round {number}: held-out loss of gists {before:.4f} -> {after:.4f}{'' if kept else ', thrown away'}")
        label_scenes(
            folder / "labels", model, gistnet, corpora, articles, options.scenes, options.seed + number,
            options=samples,
        )  # fmt: skip
        lensnet, old, new, lens_kept = _lens_phase(folder, model, gistnet, lensnet, options)
        say(f"round {number}: rank correlation of LensNet {old:.3f} -> {new:.3f}{'' if lens_kept else ', thrown away'}")
        done.append(Round(number, (before, after), kept, (old, new), lens_kept))
        (run / ROUNDS).write_text("".join(json.dumps(asdict(one)) + "\n" for one in done))
        if not kept and not lens_kept:
            break
    return gistnet, lensnet, done


def _gist_phase(
    folder: Path, model: LoadedModel, corpora: Sequence[Corpus], held: HeldOut, net: GistNet, settings: GistSettings,
    options: JointOptions,
) -> tuple[GistNet, float, float, bool]:  # fmt: skip
    task = make_task(model.decoder, corpora, settings, net, seed=options.seed)

    def held_out() -> float:
        return float(np.mean([losses["loss"].mean() for losses in held_out_losses(task, held).values()]))

    before = held_out()
    trainer = Trainer(task, folder, options.gist)
    trainer.run()
    averaged = trainer.averaged()
    for name, x in averaged.items():
        task.parameters[name].data.copy_(x)
    after = held_out()
    kept = after < before - options.least_gist
    return task.maker.install(net, averaged) if kept else net, before, after, kept


def _lens_phase(
    folder: Path, model: LoadedModel, gistnet: GistNet, lensnet: LensNet, options: JointOptions
) -> tuple[LensNet, float, float, bool]:
    fitted, apart = fit_lens(folder, model, gistnet, lensnet, options.lens, LensTaskOptions())
    before, after = rank_correlation(lensnet, apart), rank_correlation(fitted, apart)
    kept = after > before + options.least_lens
    return fitted if kept else lensnet, before, after, kept
