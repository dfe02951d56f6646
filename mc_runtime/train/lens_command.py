"""`mc train lens`: label contexts, then fit LensNet to the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_runtime.errors import InputError

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def lens(
    texts: Annotated[list[str], typer.Argument(help="Text files or folders, each PATH or PATH=WEIGHT.")],
    run: Annotated[Path, typer.Option(help="Folder of the run: labels, state, log. What is there is gone on with.")],
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors).")],
    gistnet: Annotated[Path, typer.Option(help="The trained gists that LensNet is to judge.")],
    questions: Annotated[
        list[Path] | None, typer.Option(help="Questions in SQuAD's format; may be repeated.", show_default="none")
    ] = None,
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    start: Annotated[Path | None, typer.Option(help="Weights to start from.", show_default="zero scores")] = None,
    scenes: Annotated[int, typer.Option(help="Scenes to label, of about 4,096 tokens each.")] = 1000,
    label_minutes: Annotated[
        float | None, typer.Option(help="Stop labelling after so long, and train on what there is.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Length of the schedule.")] = 400,
    minutes: Annotated[float | None, typer.Option(help="Stop training, with a checkpoint, after so long.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-4,
    seed: Annotated[int, typer.Option(help="Of scenes and batches.")] = 0,
) -> None:
    """Train LensNet to foresee what opening a gist gains, and closing it costs, over the tokens that follow.

    Labels are gradients of gates in the attention: one forward and backward for all edits of a context. They are kept
    in the run's folder; train GistNet further, and they are best made anew.

    Example: mc train lens books/ docs/ --questions train.json --gistnet gist.safetensors --run runs/lens --out l.st
    """
    import torch

    from mc_runtime.config import MemoryConfig
    from mc_runtime.gistnet import GistNet
    from mc_runtime.lensnet import LensNet
    from mc_runtime.model import cache_dir, load_model

    from .command import parse_texts
    from .corpus import Corpus
    from .distributed import joined
    from .freed_memory import keep_freed_memory
    from .gist_command import plot_run
    from .lens_fit import fit_lens, label_scenes, report_fit
    from .lens_questions import read_articles
    from .lens_task import LensTaskOptions
    from .trainer import LOG, TrainOptions

    files = parse_texts(texts)
    if scenes < 2:
        raise InputError(f"scenes: expected at least 2, got {scenes}")
    with joined() as rank:
        keep_freed_memory()
        loaded = load_model(model)
        net = GistNet.load(gistnet, loaded.decoder, MemoryConfig().block_size)
        lensnet = LensNet.untrained(loaded.decoder) if start is None else LensNet.load(start, loaded.decoder)
        with console.status("tokenising"):
            corpora = [Corpus.open(p, loaded.tokenizer, cache_dir() / "tokens", weight=w) for p, w in files]
        articles = [article for path in questions or [] for article in read_articles(path)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=rank > 0) as bar:
            shown = bar.add_task("labelling", total=scenes)
            label_scenes(
                run / "labels", loaded, net, corpora, articles, scenes, seed,
                minutes=label_minutes, progress=lambda done: bar.update(shown, completed=done),
            )  # fmt: skip
            shown = bar.add_task("training", total=steps)
            options = TrainOptions(
                steps=steps, lr=lr, minutes=minutes, seed=seed, accumulate=1, ema=0.99, warmup=50, save_every=200,
                weight_decay=0.1,
            )  # fmt: skip
            fitted, held_out = fit_lens(
                run, loaded, net, lensnet, options, LensTaskOptions(),
                lambda line: bar.update(shown, completed=line["step"], description=f"loss {line['loss']:.3f}"),
            )  # fmt: skip
        if rank == 0:
            fitted.save(out, dtype=torch.bfloat16)
            for line in report_fit(fitted, held_out):
                console.print(line)
            console.print(f"{out}")
            plot_run(run / LOG, f"LensNet, {steps} steps")
