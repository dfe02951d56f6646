"""`mc train ablate`: what each part of the training is worth on held-out text."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from .ablate import Result

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def ablate(
    texts: Annotated[list[str], typer.Argument(help="Texts to train on, each PATH or PATH=WEIGHT.")],
    held: Annotated[list[str], typer.Option(help="Texts to score on; may be repeated.")],
    run: Annotated[Path, typer.Option(help="Folder of the runs, one below it per variant.")],
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", "-v", help="A change, as layers=0 or kind=embedding,width=128; may be repeated."),
    ] = None,
    base: Annotated[str, typer.Option(help="Changes that all variants share.", show_default="none")] = "",
    out: Annotated[Path | None, typer.Option(help="Report to write (JSON).", show_default="none")] = None,
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    start: Annotated[
        Path | None, typer.Option(help="Weights that all variants start from.", show_default="none")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of every variant; 0 scores the start.")] = 50,
    accumulate: Annotated[int, typer.Option(help="Micro-batches per step.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the samples and of untrained weights.")] = 0,
    n: Annotated[int, typer.Option("-n", help="Held-out micro-batches per text.")] = 20,
    far: Annotated[int, typer.Option(help="Far tokens of a held-out sample, all as gists.")] = 512,
    tokens: Annotated[int, typer.Option(help="Of a held-out micro-batch, about.")] = 4096,
) -> None:
    """Train variants of a gist training alike and print the held-out loss of each, paired with the first.

    A variant changes settings of `mc train gist` by name: kind, levels, block_size, gists, width, layers, pool, rank,
    keep_vectors, objective, teacher, recon, contrast, curriculum (as 0.2:0.2), true_positions, tokens, lr; and what
    GistNet reads, which no memory gives it: inputs (as hidden:4) and left_context.

    Example: mc train ablate docs/ --held novel.txt --run runs/ablate -v recon=0.1 -v gists=2 -v kind=embedding
    """
    from mc_runtime.errors import InputError
    from mc_runtime.gistnet import GistNet
    from mc_runtime.model import cache_dir, load_model

    from .ablate import BASE, HeldOut, Variant, parse_variant, run_variant
    from .command import parse_texts
    from .corpus import Corpus
    from .freed_memory import keep_freed_memory
    from .gist_start import GistSettings
    from .trainer import TrainOptions

    if n < 2:
        raise InputError(f"n: expected at least 2 micro-batches, got {n}")
    shared = parse_variant(base, GistSettings()) if base else Variant(BASE, GistSettings())
    variants = [Variant(BASE, shared.settings, shared.lr)]
    for text in variant or []:
        parsed = parse_variant(text, shared.settings)
        variants.append(parsed if parsed.lr is not None else Variant(text, parsed.settings, shared.lr))
    if len({v.name for v in variants}) < len(variants):
        raise InputError("variant: expected names that differ")
    keep_freed_memory()
    loaded = load_model(model)
    decoder = loaded.decoder
    with console.status("tokenising"):
        cache = cache_dir() / "tokens"
        corpora = [Corpus.open(p, loaded.tokenizer, cache, weight=w) for p, w in parse_texts(texts)]
        scored = HeldOut([Corpus.open(p, loaded.tokenizer, cache) for p, _ in parse_texts(held)], n, far, tokens=tokens)
    options = TrainOptions(steps=steps, accumulate=accumulate, seed=seed)
    results: list[Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        for v in variants:
            shown = bar.add_task(v.name, total=steps)
            size = v.settings.block_size
            net = GistNet.load(start, decoder, size) if start else GistNet.untrained(decoder, size)
            folder = run / re.sub(r"[^\w.=-]+", "_", v.name)
            results.append(
                run_variant(
                    decoder, corpora, v, net, scored, folder, options, console.print,
                    lambda line, shown=shown: bar.update(shown, completed=line["step"]),  # type: ignore[misc]
                )
            )  # fmt: skip
            bar.update(shown, completed=steps)
    Console().print(table(results))
    if out is not None:
        report = {
            "model": loaded.fingerprint, "steps": steps, "accumulate": accumulate, "seed": seed, "far": far, "n": n,
            "texts": [f"{c.name}={c.weight:g}" for c in corpora], "start": start.name if start else None,
            "variants": [result.to_dict(results[0]) for result in results],
        }  # fmt: skip
        out.write_text(json.dumps(report, indent=1) + "\n")


def table(results: list[Result]) -> Table:
    """A row per variant, and per text its NLL and the paired difference of its loss to the first variant's."""
    drawn = Table(title="held-out NLL; loss against base +- standard error (negative is better)")
    for name in ("variant", "parameters", "s / step", *results[0].held):
        drawn.add_column(name, justify="left" if name == "variant" else "right")
    for result in results:
        cells = []
        for text, losses in result.held.items():
            paired = result.against(results[0], text)
            against = "other samples" if paired is None else f"{paired[0]:+.4f} ± {paired[1]:.4f}"
            cells.append(f"{losses['nll'].mean():.4f}" + ("" if result is results[0] else f"  {against}"))
        size = f"{result.parameters / 1e6:.2f}M"
        drawn.add_row(result.variant.name, size, f"{result.seconds:.2f}", *cells)
    return drawn
