"""`mc eval staleness`: what each refresh mode loses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE
from rich.table import Table

from mc_runtime.errors import InputError

from .shared import Model, Out, Plot, Seed, Texts, check_at_least, err_console, out_console, progress_bar


def staleness(
    texts: Texts,
    gistnet: Annotated[Path | None, typer.Option(help="Trained gists.", show_default="untrained")] = None,
    model: Model = "smollm2-135m",
    history: Annotated[int, typer.Option(help="Tokens that the context shows.")] = 2000,
    budget: Annotated[int, typer.Option(help="Cache slots.")] = 512,
    recent: Annotated[int, typer.Option(help="Newest tokens, always in full.")] = 64,
    targets: Annotated[int, typer.Option(help="True tokens that are predicted.")] = 64,
    edits: Annotated[str, typer.Option(help="Numbers of single edits after which to measure, with commas.")] = "1,8,32",
    n: Annotated[int, typer.Option("-n", help="Contexts per text.")] = 30,
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Open and close blocks of a full context, one at a time: how far each refresh mode's predictions drift from those
    of the same layout assembled anew (KL, accuracy), and how many entries it recomputes; with 95% bootstrap intervals.

    Example: mc eval staleness held-out/ --gistnet gist.safetensors --out staleness.json
    """
    try:
        counts = tuple(sorted({int(number) for number in edits.split(",")}))
    except ValueError:
        raise InputError(f"edits: expected numbers with commas, got {edits!r}") from None
    if counts[0] < 1:
        raise InputError(f"edits: expected numbers of at least 1, got {edits!r}")
    check_at_least(1, history=history, recent=recent, targets=targets, n=n)

    from mc_runtime.config import MemoryConfig
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus

    from .. import staleness_report as reports
    from ..staleness import Reading, StalenessSetting
    from ..staleness import staleness as measure

    defaults = MemoryConfig()
    setting = StalenessSetting(
        history, budget, recent, targets, counts, n, seed,
        defaults.block_size, defaults.refresh_tail, defaults.refresh_share,
    )  # fmt: skip
    files = parse_texts(texts)
    loaded = load_model(model)
    found: dict[str, list[Reading]] = {}
    try:
        with progress_bar() as bar:
            for path, _ in files:
                corpus = Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens")
                task = bar.add_task(corpus.name, total=n)
                readings = found.setdefault(corpus.name, [])
                measure(loaded, corpus, setting, gistnet, readings, partial(bar.advance, task))
    except KeyboardInterrupt:
        err_console.print("interrupted; what follows is of the contexts that were measured")
    title = (
        f"KL(assembled anew || mode) after single edits, {history:,} tokens in {budget:,} slots; tail: the newest "
        f"{setting.tail}; top: {setting.share:.0%} of what is behind the edit"
    )
    table = Table(
        "text", "edits", "mode", "KL, nats per token", "right", "agrees", "recomputed per edit",
        title=title, title_justify="left", box=SIMPLE,
    )  # fmt: skip
    for text, shown in reports.with_overall(found).items():
        for row in reports.rows(text, shown):
            table.add_row(*row)
    out_console.print(table)
    if out is not None:
        about = {
            "model": model,
            "model_fingerprint": loaded.fingerprint,
            "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
            "gistnet": None if gistnet is None else gistnet.name,
        }
        out.write_text(json.dumps(reports.to_dict(about, found, setting), indent=1) + "\n")
    if plot is not None and any(found.values()):
        reports.draw(found, plot, f"{history:,} tokens in {budget:,} slots, n = {n} per text; {model}")
