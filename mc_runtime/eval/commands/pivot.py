"""`mc eval pivot`: conversations that turn from topic to topic, held with our memory and with rivals."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .needle import Budget, Gistnet, Lensnet, Recent, Refresh, Work
from .shared import Model, Out, Plot, Seed, Texts, check_at_least, err_console, out_console, progress_bar

READERS = ("retrieval", "blend", "lensnet", "lensnet+retrieval", "attention", "focus-recency", "random", "oracle")
RIVALS = ("bm25", "recency", "none", "full", "evidence")


def pivot(
    texts: Texts,
    size: Annotated[str, typer.Option(help="Tokens of a history: 16k, 100k.")] = "16k",
    readers: Annotated[
        str, typer.Option(help=f"With commas, or `all`: {', '.join((*READERS, *RIVALS))}.")
    ] = "retrieval,blend,bm25,recency,none",
    gistnet: Gistnet = None,
    lensnet: Lensnet = None,
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    recent: Recent = 32,
    refresh: Refresh = "text",
    n: Annotated[int, typer.Option("-n", help="Conversations; each has one pivot, one return, one update.")] = 100,
    topics: Annotated[int, typer.Option(help="Topics of a history, and conversations over it.")] = 8,
    turns: Annotated[int, typer.Option(help="Questions in a row on one topic.")] = 2,
    candidates: Annotated[int, typer.Option(help="Answers that are ranked, the right one included.")] = 10,
    work: Work = Path("pivot_work"),
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Questions on topic A, then B, then A again, of which one fact has changed meanwhile, over a history far beyond
    the window. Right answers on the first turn after a pivot, on the return and else; how often the old value wins;
    swaps, and tokens until what is asked stands in full detail. Turns are remembered.

    Example: mc eval pivot held-out/ --size 16k --readers retrieval,lensnet,bm25 --lensnet lens.safetensors
    """
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus

    from ..pivot import report as reports
    from ..pivot.plan import Planner
    from ..pivot.run import Record, Setting, measure
    from ..readers.opening import open_readers, parse_names, parse_size

    check_at_least(1, n=n)
    check_at_least(2, candidates=candidates)
    names = ",".join(parse_names("readers", readers, (*READERS, *RIVALS)))
    setting = Setting(parse_size(size), n, topics, turns, candidates, seed)
    loaded = load_model(model)
    files = [path for path, _ in parse_texts(texts)]
    corpora = [Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens") for path in files]
    planner = Planner(loaded.tokenizer, corpora, topics=topics, turns=turns, candidates=candidates)
    store, lineup = open_readers(
        loaded, names, work, budget=budget, recent=recent, refresh=refresh, gistnet=gistnet, lensnet=lensnet
    )
    about: dict[str, object] = {
        "model": model,
        "model_fingerprint": loaded.fingerprint,
        "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
        "gistnet": gistnet.name if gistnet is not None else None,
        "lensnet": lensnet.name if lensnet is not None else None,
        "texts": [path.name for path in files],
        "budget": budget,
        "recent": recent,
        "refresh": refresh,
        **asdict(setting),
    }
    records: list[Record] = []
    try:
        with progress_bar() as bar:
            reading = bar.add_task("reading", total=None)
            answering = bar.add_task("turns", total=n * 3 * turns * len(lineup))

            def ingested(what: str, done: int, total: int) -> None:
                bar.update(reading, description=what, completed=done, total=total)

            for record in measure(planner, lineup, setting, ingested):
                records.append(record)
                bar.advance(answering)
    except KeyboardInterrupt:
        err_console.print(f"interrupted after {len(records)} turns; what follows is of those")
    finally:
        store.close()
        if out is not None and records:
            out.write_text(json.dumps(reports.to_json(about, records), indent=1) + "\n")
    found = reports.rows(records)
    out_console.print(reports.table(found))
    if plot is not None and found:
        reports.plot(found, plot)
