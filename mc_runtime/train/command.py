"""`mc train`: make the weights that `mc generate --gistnet` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_runtime.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Train GistNet on texts of your own; the base model stays frozen.")
console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def parse_texts(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """`PATH` or `PATH=WEIGHT`; a directory stands for the .txt and .txt.xz files in it. Raises InputError."""
    found: list[tuple[Path, float]] = []
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            raise InputError(f"text: expected PATH=WEIGHT with a number, got {text!r}") from None
        if not weight > 0:
            raise InputError(f"text: expected a positive weight, got {text!r}")
        path = Path(name)
        files = sorted(p for p in path.iterdir() if p.name.endswith((".txt", ".txt.xz"))) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: holds no .txt or .txt.xz file")
        found += [(file, weight) for file in files]
    return found


@app.command()
def gist(
    texts: Annotated[list[str], typer.Argument(help="Text files or folders, each PATH or PATH=WEIGHT.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one goes on where it stopped.")],
    out: Annotated[Path, typer.Option(help="Weights to write (safetensors).")],
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    start: Annotated[Path | None, typer.Option(help="Weights to start from.", show_default="the mean")] = None,
    steps: Annotated[int, typer.Option(help="Length of the schedule.")] = 300,
    minutes: Annotated[float | None, typer.Option(help="Stop, with a checkpoint, after so long.")] = None,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    levels: Annotated[int, typer.Option(help="1: gists of tokens; 2: gists of gists too.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
) -> None:
    """Train pooled gists: what follows a text must be as likely after its gists as after the text itself.

    Several processes train together under torchrun. Example:
    mc train gist books/=2 docs/ --run runs/gist --out gist.safetensors --minutes 60
    """
    import torch
    import torch.distributed as dist

    from mc_kernels import GistPoolWeights
    from mc_runtime.config import MemoryConfig
    from mc_runtime.gistnet import GistNet
    from mc_runtime.model import cache_dir, load_model

    from .corpus import Corpus
    from .gist_task import GistTask, GistTaskOptions
    from .layouts import LayoutOptions
    from .trainer import Trainer, TrainOptions

    if levels not in (1, 2):
        raise InputError(f"levels: expected 1 or 2, got {levels}")
    files = parse_texts(texts)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        loaded = load_model(model)
        c, size = loaded.config, MemoryConfig().block_size
        with console.status("tokenising"):
            corpora = [Corpus.open(p, loaded.tokenizer, cache_dir() / "tokens", weight=w) for p, w in files]
        net = GistNet.untrained(loaded.decoder, size) if start is None else GistNet.load(start, loaded.decoder, size)
        fresh = GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, size, c.head_dim).to(loaded.decoder.device)
        pools = [*net.pool_weights, fresh][:levels] if start is not None else [fresh] * levels
        layout = LayoutOptions(level2=0.5 if levels == 2 else 0.0)
        lengths: dict[str, Any] = (
            {"lengths": (1024, 2048), "length_weights": (1.0, 1.0), "cuts": (2, 2)} if levels == 2 else {}
        )
        task = GistTask(loaded.decoder, corpora, pools, GistTaskOptions(layout=layout, **lengths))
        trainer = Trainer(task, run, TrainOptions(steps=steps, minutes=minutes, lr=lr, seed=seed))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
            shown = bar.add_task("training", total=steps, completed=trainer.step)
            trainer.run(
                lambda line: bar.update(
                    shown, completed=line["step"], description=f"loss {line['loss']:.3f}, nll {line['nll']:.3f}"
                )
            )
        if trainer.rank == 0:
            pooled = tuple(task.weights(trainer.averaged()))
            GistNet(net.encode_weights, pooled, net.projector, "").save(out)
            console.print(f"step {trainer.step} of {steps}: {out}")
        if dist.is_initialized():
            dist.barrier()  # gloo aborts where one process leaves while another still talks to it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
