"""The main job on a real book: remember 107,000 tokens, answer from them within 2,048 cache slots.

`make demo` runs it. Questions come in one conversation with two changes of topic and a return; the same model with a
plain window over the newest tokens answers beside it. `--all` also counts right answers over all forty questions.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from fetch import FetchError, fetch_book
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from mc_runtime import MegaContextError, SamplingParams, Session
from mc_runtime.model import DEFAULT_MODEL, cache_dir, load_model
from mc_runtime.recent_window import RecentWindow
from mc_runtime.shipped import SHIPPED, UNTRAINED
from mc_runtime.stats import TurnStats

console = Console(highlight=False)
ANSWER = SamplingParams(max_new_tokens=32)
# So small a model repeats its last answer where it sees it: turns leave full detail as soon as they are over.
RECENT_TOKENS = 32
BATCH = 8


def questions() -> list[dict[str, Any]]:
    """All questions, with `demo` their place in the demo's conversation or None."""
    loaded: list[dict[str, Any]] = json.loads(Path(__file__).with_name("questions.json").read_text(encoding="utf-8"))
    return loaded


def is_right(answer: str, accepted: Sequence[str]) -> bool:
    return any(text in answer.lower() for text in accepted)


def ingest(session: Session, book: Path, fast: bool) -> None:
    """Read the book into the memory with a progress bar, and say how fast that went."""
    ids = session.model.tokenizer.encode(book.read_text(encoding="utf-8"))
    start = time.perf_counter()
    with Progress(
        TextColumn("reading the book"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
        TextColumn("{task.fields[rate]} tokens/s"), TimeElapsedColumn(), TimeRemainingColumn(), console=console,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=len(ids), rate="")

        def progress(done: int) -> None:
            bar.update(task, completed=done, rate=f"{done / (time.perf_counter() - start):,.0f}")

        session.ingest(book, title="Grimm and Andersen", mode="fast" if fast else "contextual", progress=progress)
    seconds = time.perf_counter() - start
    nodes = ", ".join(f"{count:,} at level {level}" for level, count in session.stats().nodes.items())
    console.print(f"{len(ids):,} tokens in {seconds:.0f} s ({len(ids) / seconds:,.0f} tokens/s); gists: {nodes}\n")


def converse(session: Session, window: RecentWindow, asked: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Ask in one conversation, streaming; returns right answers of the memory and of the window."""
    right = [0, 0]
    for item in asked:
        console.print(f"[bold]{item['question']}[/]  [dim]({item['topic']})[/]")
        console.print("  memory  ", end="")
        answer = ""
        for piece in session.generate(item["question"], stream=True, max_new_tokens=ANSWER.max_new_tokens, stop=["\n"]):
            console.print(piece, end="", markup=False, style="cyan")
            answer += piece
        right[0] += mark(answer, item["answers"])
        console.print("  window  ", end="")
        answer = "".join(window.generate(item["question"], ANSWER)).split("\n")[0]
        console.print(answer, end="", markup=False, style="yellow")
        right[1] += mark(answer, item["answers"])
        report(session, window.turns[-1])
    return right[0], right[1]


def mark(answer: str, accepted: Sequence[str]) -> bool:
    right = is_right(answer, accepted)
    console.print("  [green]right[/]" if right else "  [red]wrong[/]")
    return right


def report(session: Session, rival: TurnStats) -> None:
    """One turn's sizes and times, beside those of the window."""
    stats = session.stats()
    turn = stats.turns[-1]
    slots = ", ".join(f"{count:,} at level {level}" for level, count in stats.slots.items())
    console.print(
        f"  [dim]{stats.tokens:,} tokens in the tree, {stats.used:,} slots ({slots}), {turn.edits} edits, "
        f"{turn.seconds_per_refocus * 1e3:,.0f} ms per refocus[/]\n"
        f"  [dim]ms per token {turn.seconds_per_token * 1e3:.0f} (window {rival.seconds_per_token * 1e3:.0f}), "
        f"first token after {turn.time_to_first_token:.2f} s (window {rival.time_to_first_token:.2f} s)[/]\n"
    )


def count_all(session: Session, window: RecentWindow, items: Sequence[dict[str, Any]]) -> Table:
    """Right answers over all questions, each asked on its own; nothing of this is remembered."""
    right = {"memory": 0, "recent window": 0, "no text": 0}
    blank = RecentWindow(window.model, window.head, window.head, session.config.budget)
    with Progress(TextColumn("all questions"), BarColumn(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task("", total=len(items))
        for i in range(0, len(items), BATCH):
            part = items[i : i + BATCH]
            answers = session.generate(
                [item["question"] for item in part], max_new_tokens=ANSWER.max_new_tokens, stop=["\n"]
            )
            for item, answer in zip(part, answers, strict=True):
                right["memory"] += is_right(answer, item["answers"])
                for name, rival in (("recent window", window), ("no text", blank)):
                    said = "".join(rival.generate(item["question"], ANSWER, remember=False))
                    right[name] += is_right(said.split("\n")[0], item["answers"])
                bar.advance(task)
    table = Table("reader", "right answers", "of", title=f"all questions, {session.config.budget:,} slots each")
    for name, count in right.items():
        table.add_row(name, str(count), str(len(items)))
    return table


def main(
    fast: Annotated[bool, typer.Option("--fast", help="Ingest with GistNet alone, without the model.")] = False,
    all_questions: Annotated[bool, typer.Option("--all", help="Also count right answers over all questions.")] = False,
    model: Annotated[str, typer.Option(help="Model name, directory or GGUF file.")] = DEFAULT_MODEL,
    budget: Annotated[int, typer.Option(help="Slots of the Working Context.")] = 2048,
    policy: Annotated[str, typer.Option(help="Focus policy.")] = "retrieval",
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Use means of keys and values as gists, the baseline.")
    ] = False,
    gist_bias: Annotated[
        float | None, typer.Option(help="Log-weight of gists in attention.", show_default="as the weights ask")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Use the memory of the last run instead of a new one.")] = False,
    out: Annotated[Path, typer.Option(help="Where the memory and the picture go.")] = Path("demo_out"),
) -> None:
    """Remember a real book, answer from it, and draw where the memory looked."""
    memory = out / "memory"
    if not keep:
        shutil.rmtree(memory, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    with console.status("fetching the book and the model (the first time takes a minute)"):
        book = fetch_book(cache_dir() / "book")
        loaded = load_model(model)
    gistnet = UNTRAINED if untrained else SHIPPED
    settings = {"budget": budget, "policy": policy, "recent_tokens": RECENT_TOKENS, "gist_bias": gist_bias}
    with Session.open(memory, loaded, gistnet=gistnet, **settings) as session:
        console.print(f"gists: {gistnet}, log-weight {session.config.gist_bias:g} in attention")
        if session.tree.length < 10_000:
            ingest(session, book, fast)
        tokens = session.tree.tokens().tolist()
        window = RecentWindow(loaded, tokens[: session.focus.head], tokens, budget)
        items = questions()
        asked = sorted((item for item in items if item["demo"]), key=lambda item: item["demo"])
        table = count_all(session, window, items) if all_questions else None
        right = converse(session, window, asked)
        console.print(f"right: memory {right[0]} of {len(asked)}, recent window {right[1]} of {len(asked)}")
        if table is not None:
            console.print(table)
        turns = session.stats().turns[-len(asked) :]
        ours, theirs = (
            statistics.median(t.seconds_per_token for t in ts) for ts in (turns, window.turns[-len(asked) :])
        )
        console.print(f"median ms per token: memory {ours * 1e3:.1f}, recent window {theirs * 1e3:.1f}")
        focus_map = session.focus_map()
        frames = zip(focus_map.frames[-len(asked) :], asked, strict=True)
        focus_map.frames = [replace(frame, label=item["question"]) for frame, item in frames]
        console.print(focus_map.save_png(out / "focus_map.png", title="Where a 2,048-slot memory looks in a book"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except (MegaContextError, FetchError) as error:
        console.print(f"[red]{error}[/]")
        sys.exit(2)
