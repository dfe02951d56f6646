"""`mc train joint`: GistNet and LensNet in turn."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mc_runtime.errors import InputError

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def joint(
    texts: Annotated[list[str], typer.Argument(help="Text files or folders, each PATH or PATH=WEIGHT.")],
    held: Annotated[list[str], typer.Option(help="Held-out texts that judge each phase; may be repeated.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on where it stopped.")],
    out: Annotated[Path, typer.Option(help="GistNet's weights to write.")],
    lens_out: Annotated[Path, typer.Option(help="LensNet's weights to write.")],
    start: Annotated[Path | None, typer.Option(help="GistNet's weights to start from.", show_default="none")] = None,
    lens_start: Annotated[Path | None, typer.Option(help="LensNet's, the same.", show_default="none")] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="Questions in SQuAD's format; may be repeated.", show_default="none")
    ] = None,
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    levels: Annotated[int, typer.Option(help="1: gists of tokens; 2: gists of gists too.")] = 2,
    rounds: Annotated[int, typer.Option(help="At most; stops when neither net gets better.")] = 4,
    gist_steps: Annotated[int, typer.Option(help="Of GistNet in each round.")] = 60,
    lens_steps: Annotated[int, typer.Option(help="Of LensNet in each round.")] = 1000,
    scenes: Annotated[int, typer.Option(help="Labelled anew in each round.")] = 300,
    gist_lr: Annotated[float, typer.Option(help="GistNet's peak learning rate.")] = 1e-3,
    lens_lr: Annotated[float, typer.Option(help="LensNet's peak learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of samples and scenes.")] = 0,
) -> None:
    """Train both nets in turn on pooled gists; labels for LensNet are made anew after each phase of GistNet.

    Example: mc train joint books/ --held held.txt --questions train.json --run runs/joint --out g.st --lens-out l.st
    """
    import torch

    from mc_runtime.gistnet import GistNet
    from mc_runtime.lensnet import LensNet
    from mc_runtime.model import cache_dir, load_model

    from .ablate import HeldOut
    from .command import parse_texts
    from .corpus import Corpus
    from .distributed import joined
    from .freed_memory import keep_freed_memory
    from .gist_start import GistSettings
    from .joint import JointOptions, train_jointly
    from .lens_questions import read_articles
    from .trainer import TrainOptions

    files, held_files = parse_texts(texts), parse_texts(held)
    if rounds < 1 or scenes < 2:
        raise InputError(f"rounds, scenes: expected at least 1 and 2, got {rounds} and {scenes}")
    with joined() as rank:
        keep_freed_memory()
        loaded = load_model(model)
        settings = GistSettings(levels=levels)
        size = settings.block_size
        gistnet = (
            GistNet.untrained(loaded.decoder, size) if start is None else GistNet.load(start, loaded.decoder, size)
        )
        lensnet = LensNet.untrained(loaded.decoder) if lens_start is None else LensNet.load(lens_start, loaded.decoder)
        with console.status("tokenising"):
            tokens = cache_dir() / "tokens"
            corpora = [Corpus.open(p, loaded.tokenizer, tokens, weight=w) for p, w in files]
            apart = [Corpus.open(p, loaded.tokenizer, tokens) for p, _ in held_files]
        articles = [article for path in questions or [] for article in read_articles(path)]
        options = JointOptions(
            rounds,
            scenes,
            TrainOptions(steps=gist_steps, lr=gist_lr, seed=seed),
            TrainOptions(steps=lens_steps, lr=lens_lr, seed=seed, accumulate=1, ema=0.99, weight_decay=0.05),
            seed=seed,
        )
        far = 1024 if levels == 1 else 2048
        gistnet, lensnet, _ = train_jointly(
            run, loaded, corpora, articles, HeldOut(apart, far=far), gistnet, lensnet, settings, options,
            say=console.print if rank == 0 else (lambda _: None),
        )  # fmt: skip
        if rank == 0:
            gistnet.save(out, dtype=torch.bfloat16)
            lensnet.save(lens_out, dtype=torch.bfloat16)
            console.print(f"{out}, {lens_out}")
