"""`mc eval needle`: facts planted in long texts, asked of our memory and of rivals with as many slots."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .shared import Model, Out, Plot, Seed, check_at_least, err_console, out_console, progress_bar

Readers = Annotated[str, typer.Option(help="Names with commas, or `all`; see `mc_runtime.eval.readers.READERS`.")]
Work = Annotated[Path, typer.Option(help="Memories of the histories are kept here and used again.")]
Budget = Annotated[int, typer.Option(help="Cache slots that every reader but the ceiling has.")]
Recent = Annotated[int, typer.Option(help="Newest tokens at full detail.")]
Refresh = Annotated[str, typer.Option(help="What ours recomputes after an edit: none, tail, top, text or full.")]
Gistnet = Annotated[Path | None, typer.Option(help="Trained GistNet weights.", show_default="untrained")]
Lensnet = Annotated[Path | None, typer.Option(help="Trained weights for the lensnet readers.", show_default="none")]


def needle(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Held-out texts to plant facts in (task prose).", show_default="none")
    ] = None,
    sizes: Annotated[str, typer.Option(help="Tokens of a history, with commas: 4k,16k,100k,1M.")] = "4k,16k",
    tasks: Annotated[
        str,
        typer.Option(
            help="With commas, or `all`: prose, passkey, questions (people's, about articles), and RULER's "
            "niah_single_1, niah_multikey_2, niah_multikey_3, vt, cwe, fwe."
        ),
    ] = "prose,passkey",
    questions: Annotated[
        list[Path] | None,
        typer.Option(help="Articles in SQuAD's format for the task questions; may be repeated.", show_default="none"),
    ] = None,
    readers: Readers = "blend,retrieval,oracle,random,bm25,recency,none,full",
    gistnet: Gistnet = None,
    lensnet: Lensnet = None,
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    recent: Recent = 32,
    refresh: Refresh = "text",
    n: Annotated[int, typer.Option("-n", help="Questions per task and size.")] = 100,
    keys: Annotated[int, typer.Option(help="Questions that one history serves, at most.")] = 20,
    candidates: Annotated[int, typer.Option(help="Answers that are ranked, the right one included.")] = 10,
    read_limit: Annotated[
        str,
        typer.Option(help="Longer histories are read around their facts alone; the rest gets copied gists."),
    ] = "128k",
    work: Work = Path("needle_work"),
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Facts that no model can know, planted at drawn depths of long histories, or people's questions about articles:
    which does a reader find and read?

    A reply is scored by what it says and by whether the right one of several candidates is the likeliest; shares come
    with 95% Wilson intervals. No question leaves a trace.

    Example: mc eval needle held-out/ --sizes 16k,100k --readers blend,lensnet,bm25,recency --lensnet lens.safetensors
    """
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus
    from mc_runtime.train.lens_questions import read_articles

    from ..needle import report as reports
    from ..needle.run import Record, Setting, measure
    from ..needle.tasks import TASKS, make_tasks
    from ..readers.opening import open_readers, parse_names, parse_size

    check_at_least(1, n=n, keys=keys)
    check_at_least(2, candidates=candidates)
    setting = Setting(tuple(parse_size(s) for s in sizes.split(",")), n, keys, seed)
    names = parse_names("tasks", tasks, TASKS)
    loaded = load_model(model)
    files = [path for path, _ in parse_texts(texts or [])]
    corpora = [Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens") for path in files]
    articles = [article for path in questions or [] for article in read_articles(path)]
    chosen = make_tasks(names, loaded.tokenizer, corpora, candidates, parse_size(read_limit), articles)
    store, lineup = open_readers(
        loaded, readers, work, budget=budget, recent=recent, refresh=refresh, gistnet=gistnet, lensnet=lensnet
    )
    about: dict[str, object] = {
        "model": model,
        "model_fingerprint": loaded.fingerprint,
        "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
        "gistnet": gistnet.name if gistnet is not None else None,
        "lensnet": lensnet.name if lensnet is not None else None,
        "texts": [path.name for path in [*files, *(questions or [])]],
        "budget": budget,
        "recent": recent,
        "refresh": refresh,
        "candidates": candidates,
        **asdict(setting),
    }
    records: list[Record] = []
    try:
        with progress_bar() as bar:
            reading = bar.add_task("reading", total=None)
            answering = bar.add_task("questions", total=n * len(setting.sizes) * len(chosen) * len(lineup))

            def ingested(what: str, done: int, total: int) -> None:
                bar.update(reading, description=what, completed=done, total=total)

            for record in measure(chosen, lineup, setting, ingested):
                records.append(record)
                bar.advance(answering)
    except KeyboardInterrupt:
        err_console.print(f"interrupted after {len(records)} replies; what follows is of those")
    finally:
        store.close()
        if out is not None and records:
            out.write_text(json.dumps(reports.to_json(about, records), indent=1) + "\n")
    found = reports.rows(records)
    out_console.print(reports.table(found))
    if plot is not None and found:
        reports.plot(found, plot)
