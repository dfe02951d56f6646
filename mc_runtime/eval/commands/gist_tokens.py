"""`mc eval gist-tokens`: train the rival of that name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mc_runtime.errors import InputError

from .shared import Model, Seed, err_console, progress_bar


def gist_tokens(
    texts: Annotated[list[str], typer.Argument(help="Training texts or folders, each PATH or PATH=WEIGHT.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on where it stopped.")],
    out: Annotated[Path, typer.Option(help="Embeddings to write (safetensors).")],
    ratio: Annotated[int, typer.Option(help="Tokens per gist token, a divisor of 32.")] = 32,
    model: Model = "smollm2-135m",
    steps: Annotated[int, typer.Option(help="Length of the schedule.")] = 300,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after so long.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-2,
    seed: Seed = 0,
) -> None:
    """Train a rival: gist tokens (Mu et al. 2023) for a frozen model, with the loss of our pooled gists."""
    from mc_runtime.config import MemoryConfig
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus
    from mc_runtime.train.trainer import Trainer, TrainOptions

    from ..rivals.gist_tokens import NAME, GistTokens
    from ..rivals.gist_tokens_task import GistTokensTask

    size = MemoryConfig().block_size
    if ratio < 1 or size % ratio:
        raise InputError(f"ratio: expected a divisor of {size}, got {ratio}")
    files = parse_texts(texts)
    loaded = load_model(model)
    corpora = [Corpus.open(p, loaded.tokenizer, cache_dir() / "tokens", weight=w) for p, w in files]
    task = GistTokensTask(loaded.decoder, corpora, size // ratio, size, seed=seed)
    trainer = Trainer(task, run, TrainOptions(steps=steps, minutes=minutes, lr=lr, seed=seed))
    with progress_bar() as bar:
        shown = bar.add_task("training", total=steps, completed=trainer.step)
        trainer.run(
            lambda line: bar.update(
                shown, completed=line["step"], description=f"loss {line['loss']:.3f}, nll {line['nll']:.3f}"
            )
        )
    GistTokens(trainer.averaged()[NAME], size).save(out)
    err_console.print(f"step {trainer.step} of {steps}: {out}", soft_wrap=True)
