"""`mc train replies`: what the base model itself says to questions that it is shown the answer to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mc_runtime.errors import InputError

console = Console(stderr=True, highlight=False, markup=False, emoji=False)


def replies(
    questions: Annotated[list[Path], typer.Argument(help="Questions in SQuAD's format.")],
    out: Annotated[Path, typer.Option(help="The same with the model's replies, .json or .json.xz.")],
    model: Annotated[str, typer.Option(help="Base model, as in `mc generate`.")] = "smollm2-135m",
    limit: Annotated[int | None, typer.Option(help="Ask so many at most, drawn.", show_default="all")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so long, with what there is.")] = None,
    batch: Annotated[int, typer.Option(help="Questions that are answered together.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of a reply, at most; longer ones are cut.")] = 48,
    seed: Annotated[int, typer.Option(help="Of the drawing.")] = 0,
) -> None:
    """Ask the base model questions beside the passage that answers them, and keep the replies that hold the answer.

    `mc train gist --questions` then teaches to reply so, from the passage, whatever gists stand around it.

    Example: mc train replies squad-train.json --out replies.json.xz --minutes 20
    """
    from mc_runtime.model import load_model

    from .lens_questions import read_articles
    from .replies import own_replies, write_articles

    for name, value in (("limit", limit), ("batch", batch), ("tokens", tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name}: expected at least 1, got {value}")
    articles = [article for path in questions for article in read_articles(path)]
    loaded = load_model(model)
    total = min(sum(len(article.questions) for article in articles), limit or 1 << 62)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        shown = bar.add_task("asking", total=total)
        kept = own_replies(
            loaded, articles, limit=limit, minutes=minutes, batch=batch, tokens=tokens, seed=seed,
            progress=lambda asked, right: bar.update(shown, completed=asked, description=f"{right} right"),
        )  # fmt: skip
    console.print(f"{write_articles(out, articles, kept)} questions with replies: {out}")
