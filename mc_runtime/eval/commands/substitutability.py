"""`mc eval substitutability`: how well a few slots stand for the text they came from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from mc_runtime.errors import InputError

from .shared import Model, Out, Plot, Seed, Texts, check_at_least, err_console, out_console, progress_bar


def substitutability(
    texts: Texts,
    gistnet: Annotated[
        list[Path] | None, typer.Option(help="Trained weights; may be repeated.", show_default="rivals only")
    ] = None,
    ratio: Annotated[
        list[int] | None,
        typer.Option(help="Tokens per slot, a divisor of --far; may be repeated.", show_default="32"),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Of our gists: pooled, projected, embedding, with commas.")] = "pooled",
    rivals: Annotated[str, typer.Option(help="Names with commas (see the table), `all` or `none`.")] = "all",
    gist_tokens: Annotated[
        list[Path] | None,
        typer.Option(help="Trained by `mc eval gist-tokens`; may be repeated.", show_default="none"),
    ] = None,
    model: Model = "smollm2-135m",
    far: Annotated[int, typer.Option(help="Tokens that are to be kept, a multiple of 32.")] = 256,
    recent: Annotated[int, typer.Option(help="Tokens that every arm sees.")] = 32,
    targets: Annotated[int, typer.Option(help="Tokens whose likelihood is measured.")] = 64,
    n: Annotated[int, typer.Option("-n", help="Windows per text.")] = 100,
    true_positions: Annotated[bool, typer.Option(help="Entries where they stood, instead of packed.")] = False,
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """How well far / ratio slots stand for `far` tokens: NLL of the next true tokens, and the share of the context's
    benefit that is recovered, with 95% bootstrap intervals.

    Example: mc eval substitutability held-out/ --gistnet gist.safetensors --ratio 32 --ratio 8 --out report.json
    """
    from typing import get_args

    from mc_runtime.config import GistKind, MemoryConfig
    from mc_runtime.gistnet import GistNet
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus

    from ..report import Report, Weights, rows, verdicts
    from ..rivals.gist_tokens import GistTokens
    from ..rivals.lineup import RIVALS, ours_for, rivals_for
    from ..substitutability import Comparison, Setting
    from ..substitutability import substitutability as measure

    size, ratios = MemoryConfig().block_size, tuple(dict.fromkeys(ratio or [32]))
    if far < size or far % size:
        raise InputError(f"far: expected a positive multiple of {size}, got {far}")
    for r in ratios:
        if r < 1 or far % r or (r > size and r not in (size**2, size**3)) or (r < size and size % r):
            legal = f"a divisor of {size}, {size:,}, {size**2:,} or {size**3:,} that divides far = {far:,}"
            raise InputError(f"ratio: expected {legal}, got {r}")
    check_at_least(1, recent=recent, targets=targets, n=n)
    chosen_kinds: list[GistKind] = [kind for kind in get_args(GistKind) if kind in kinds.split(",")]
    if len(chosen_kinds) != len(kinds.split(",")):
        raise InputError(f"kinds: expected some of {', '.join(get_args(GistKind))}, got {kinds!r}")
    names = list(RIVALS) if rivals == "all" else [] if rivals == "none" else rivals.split(",")
    files = parse_texts(texts)

    loaded = load_model(model)
    nets = [(path, GistNet.load(path, loaded.decoder, size)) for path in gistnet or []]
    tokens = [GistTokens.load(path, loaded.decoder) for path in gist_tokens or []]
    lineup = {r: rivals_for(names, loaded, r, size, tokens) for r in ratios}
    for r in ratios:
        mine = [
            arm
            for path, net in nets
            for arm in ours_for(chosen_kinds, net, f" ({path.stem})" if len(nets) > 1 else "", r, size)
        ]
        if nets and not mine:
            err_console.print(f"{r}:1: no --gistnet file has gists of that ratio", soft_wrap=True)
        lineup[r] += mine
    setting = Setting(far=far, ratios=ratios, recent=recent, targets=targets, n=n, packed=not true_positions, seed=seed)

    comparisons: list[Comparison] = []
    with progress_bar() as bar:
        for path, _ in files:
            corpus = Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens")
            task = bar.add_task(corpus.name, total=n)
            comparisons += measure(loaded.decoder, corpus, lineup, setting, partial(bar.advance, task))
    for c in comparisons:
        title = f"{c.text}, {c.ratio}:1, slots for {far:,} tokens: {far // c.ratio:,}, n = {n}"
        table = Table("arm", "nats", "above full", "recovery", title=title, title_justify="left", box=SIMPLE)
        for row in rows(c):
            table.add_row(*row)
        out_console.print(table)
        for line in verdicts(c):
            out_console.print(line, soft_wrap=True)
    out_console.print("* best rival; † keeps all of the text or its K/V aside and chooses anew as the text goes on")
    dtype = str(loaded.decoder.dtype).removeprefix("torch.")
    weights = tuple(Weights(path.name, net.fingerprint) for path, net in nets)
    report = Report(model, loaded.fingerprint, dtype, weights, setting, tuple(comparisons))
    if out is not None:
        report.save(out)
    if plot is not None:
        from ..plots import draw_substitutability

        draw_substitutability(comparisons, plot, f"{far:,} tokens, {recent} recent, n = {n} per text; {model}")
