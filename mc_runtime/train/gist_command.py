"""`mc train gist`: weights of pooled, projected or embedding gists."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_runtime.errors import InputError

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def gist(
    texts: Annotated[list[str], typer.Argument(help="Text files or folders, each PATH or PATH=WEIGHT.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on where it stopped.")],
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors, bf16).")],
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    start: Annotated[
        Path | None,
        typer.Option(help="Weights to start from; parts that are not trained are kept.", show_default="none"),
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="Questions in SQuAD's format; may be repeated.", show_default="none")
    ] = None,
    question_share: Annotated[float, typer.Option(help="Of the micro-batches, where there are questions.")] = 0.35,
    kind: Annotated[str, typer.Option(help="pooled, projected or embedding.")] = "pooled",
    levels: Annotated[int, typer.Option(help="1: gists of tokens; 2: gists of gists too.")] = 1,
    train_levels: Annotated[
        str,
        typer.Option(
            "--train-levels",
            help="Levels that learn, as 1, 2 or 1,2 (pooled); 2: each sample has one of level 2.",
            show_default="all",
        ),
    ] = "",
    block_size: Annotated[int, typer.Option(help="Tokens per block, K.")] = 32,
    gists_per_block: Annotated[int, typer.Option(help="Gists per block (pooled): K / G is the compression.")] = 1,
    width: Annotated[int, typer.Option(help="Of GistNet (projected, embedding).")] = 256,
    layers: Annotated[int, typer.Option(help="Of GistNet (projected, embedding).")] = 2,
    rank: Annotated[int, typer.Option(help="Of the projector (projected).")] = 192,
    ridge_blocks: Annotated[int, typer.Option(help="Blocks that a new projector is fitted to (projected).")] = 4000,
    keep_vectors: Annotated[
        bool, typer.Option("--keep-vectors", help="Train the projector alone (projected).")
    ] = False,
    objective: Annotated[
        str, typer.Option(help="logits, or hidden:N: the stream after N layers, at a part of the cost.")
    ] = "logits",
    crowd: Annotated[
        int, typer.Option(help="Texts whose gists stand among those of a question's past; they are kept in memory.")
    ] = 0,
    reconstruct: Annotated[float, typer.Option(help="Weight of reading a gist's tokens back out of it.")] = 0.0,
    contrast: Annotated[float, typer.Option(help="Weight of keeping neighbouring gists apart.")] = 0.0,
    curriculum: Annotated[
        tuple[float, float], typer.Option(help="Shares of the steps at gists of a quarter and of half a block.")
    ] = (0.0, 0.0),
    gist_bias: Annotated[
        float | None,
        typer.Option(
            help="Log-weight in attention that gists are trained with and that a memory gives them; kept with them.",
            show_default="as --start",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Length of the schedule.", show_default="300, or as many as --minutes hold"),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop, with a checkpoint, after so long; without --steps the schedule ends with them."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Peak learning rate.", show_default="3e-3 pooled, 6e-4 projected, 1e-3 embedding"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of a micro-batch, about.")] = 4096,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step and process.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Train gists: what follows a text must be as likely after its gists as after the text itself.

    Several processes train together under `torchrun --nproc-per-node 2 -- $(which mc) train gist ...`. The run's folder
    holds the checkpoint, a log, and a plot of the losses at the end. Kinds projected and embedding share GistNet's
    vectors: training one moves the other's.

    Example: mc train gist books/=2 docs/ --run runs/gist --out gist.safetensors --minutes 60
    """
    import torch

    from mc_runtime.config import GistKind
    from mc_runtime.gistnet import GistNet
    from mc_runtime.model import cache_dir, load_model

    from .command import parse_texts
    from .corpus import Corpus
    from .distributed import joined
    from .freed_memory import keep_freed_memory
    from .gist_questions import QuestionSource
    from .gist_start import DEFAULT_LR, GistSettings, make_task
    from .lens_questions import read_articles
    from .trainer import LOG, STATE, Trainer, TrainOptions

    settings = GistSettings(
        kind=cast(GistKind, kind), levels=levels, train_levels=_levels(train_levels), block_size=block_size,
        gists=gists_per_block, width=width, layers=layers, rank=rank, ridge_blocks=ridge_blocks,
        keep_vectors=keep_vectors, objective=objective, reconstruct=reconstruct, contrast=contrast,
        curriculum=curriculum, tokens=tokens, crowd=crowd, questions=question_share if questions else 0.0,
    )  # fmt: skip
    rate = DEFAULT_LR[settings.kind] if lr is None else lr
    steps = 300 if steps is None and minutes is None else steps
    options = TrainOptions(steps=steps, minutes=minutes, lr=rate, seed=seed, accumulate=accumulate)
    files = parse_texts(texts)
    with joined() as rank_of_process:
        keep_freed_memory()
        loaded = load_model(model)
        decoder = loaded.decoder
        with console.status("tokenising"):
            corpora = [Corpus.open(p, loaded.tokenizer, cache_dir() / "tokens", weight=w) for p, w in files]
        net = GistNet.untrained(decoder, block_size) if start is None else GistNet.load(start, decoder, block_size)
        if settings.kind != "embedding":
            settings = replace(settings, gist_bias=net.gist_bias if gist_bias is None else gist_bias)
            net = replace(net, gist_bias=settings.gist_bias)
        elif gist_bias:
            raise InputError(f"gist_bias: expected none for {settings.kind} gists, got {gist_bias}")
        resumes = (run / STATE).exists()
        say = console.print if rank_of_process == 0 else _say_nothing
        articles = [article for path in questions or [] for article in read_articles(path)]
        source = QuestionSource(loaded, articles, block_size) if articles else None
        task = make_task(decoder, corpora, settings, net, resumes=resumes, seed=seed, say=say, questions=source)
        trainer = Trainer(task, run, options)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=rank_of_process > 0) as bar:
            shown = bar.add_task("training", total=steps, completed=trainer.step)  # without steps: no end is shown
            names = ("loss", "nll", "answer_nll", "reconstruction", "contrast")
            trainer.run(
                lambda line: bar.update(
                    shown,
                    completed=line["step"],
                    description=", ".join(f"{name} {line[name]:.3f}" for name in names if name in line),
                )
            )
        if trainer.rank == 0:
            trained = task.maker.install(net, trainer.averaged())
            trained.save(out, dtype=torch.bfloat16)
            of = "" if steps is None else f" of {steps}"
            console.print(f"step {trainer.step}{of}: {out}, {out.stat().st_size / 1e6:.1f} MB")
            plot_run(run / LOG, f"{settings.kind} gists, {trainer.step} steps")


def _say_nothing(_: str) -> None:
    """What the processes beside the first have to say."""


def _levels(text: str) -> tuple[int, ...] | None:
    if not text:
        return None
    if any(part not in ("1", "2") for part in text.split(",")):
        raise InputError(f"train-levels: expected 1, 2 or 1,2, got {text!r}")
    return tuple(int(part) for part in text.split(","))


def plot_run(log: Path, title: str) -> None:
    """Write `loss.png` beside a run's log, and say where it is, or what is missing for it."""
    if not log.exists():
        return
    try:
        from .plot import draw_losses
    except ImportError:
        console.print("no plot of the losses: matplotlib is not installed (pip install 'megacontext[plot]')")
        return
    console.print(f"{draw_losses(log, log.with_name('loss.png'), title)}")
