"""`mc eval`: what the memory keeps, on texts that it was not trained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mc_runtime.errors import InputError

app = typer.Typer(no_args_is_help=True, help="Measure what the memory keeps, beside rivals at equal slots.")
out_console = Console(highlight=False, markup=False, emoji=False)
err_console = Console(stderr=True, highlight=False, markup=False, emoji=False)


@app.callback()
def main() -> None:
    """Keeps `substitutability` a subcommand while it is the only one."""


@app.command()
def substitutability(
    texts: Annotated[list[str], typer.Argument(help="Held-out text files (.txt, .txt.xz) or folders.")],
    gistnet: Annotated[Path | None, typer.Option(help="Trained weights.", show_default="untrained only")] = None,
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    far: Annotated[int, typer.Option(help="Tokens that are to be kept, a multiple of 32.")] = 256,
    recent: Annotated[int, typer.Option(help="Tokens that every arm sees.")] = 32,
    targets: Annotated[int, typer.Option(help="Tokens whose likelihood is measured.")] = 64,
    n: Annotated[int, typer.Option("-n", help="Windows per text.")] = 100,
    true_positions: Annotated[bool, typer.Option(help="Entries where they stood, instead of packed.")] = False,
    seed: Annotated[int, typer.Option(help="Of the windows.")] = 1,
    out: Annotated[Path | None, typer.Option(help="Write a .json report.")] = None,
) -> None:
    """How well far / 32 slots stand for `far` tokens: NLL of the next true tokens, and the share of the context's
    benefit that is recovered, with 95% bootstrap intervals."""
    from mc_runtime.config import MemoryConfig
    from mc_runtime.gistnet import GistNet
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus

    from .rivals import Rival
    from .rivals.pooled import Pooled, mean_pooling
    from .rivals.recency import Recency
    from .rivals.snapkv import SnapKV
    from .substitutability import Setting
    from .substitutability import substitutability as measure

    size = MemoryConfig().block_size
    if far < size or far % size:
        raise InputError(f"far: expected a positive multiple of {size}, got {far}")
    for name, value in (("recent", recent), ("targets", targets), ("n", n)):
        if value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    files = parse_texts(texts)
    loaded = load_model(model)
    c = loaded.config
    rivals: list[Rival] = [mean_pooling(c.n_layers, c.n_kv_heads, c.head_dim, size), Recency(), SnapKV()]
    if gistnet is not None:
        net = GistNet.load(gistnet, loaded.decoder, size)
        rivals.append(Pooled("pooled gists (trained)", net.pool_weights[:1]))
    setting = Setting(
        far=far, slots=far // size, recent=recent, targets=targets, n=n, packed=not true_positions, seed=seed
    )
    report: dict[str, object] = {"model": model, "gistnet": str(gistnet), "setting": asdict(setting), "texts": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows: dict[str, dict[str, object]] = {}
    table = Table("text", "arm", "slots", "nats per token", "above full context", "recovery")
    with Progress(*columns, console=err_console, transient=True) as bar:
        for path, _ in files:
            corpus = Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens")
            task = bar.add_task(corpus.name, total=n)
            arms = measure(loaded.decoder, corpus, rivals, setting, partial(bar.advance, task))
            for arm in arms:
                slots = {"full context": far, "recent window": 0}.get(arm.name, setting.slots)
                table.add_row(
                    corpus.name, arm.name, str(slots), f"{arm.nll.mean():.3f}", arm.delta.text(3), arm.recovery.text()
                )
            rows[corpus.name] = {
                arm.name: {"nll": arm.nll.tolist(), "recovery": asdict(arm.recovery), "delta": asdict(arm.delta)}
                for arm in arms
            }
    out_console.print(table)
    if out is not None:
        out.write_text(json.dumps(report | {"texts": rows}, indent=1) + "\n")
