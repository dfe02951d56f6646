"""The command `mc`: remember texts, ask them, look into a memory."""

from __future__ import annotations

import sys
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import inspection
from .errors import MegaContextError
from .eval.command import app as eval_app
from .printable import printable
from .serve.command import serve
from .shipped import SHIPPED
from .train.command import app as train_app

app = typer.Typer(
    name="mc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="A memory that outgrows a frozen language model's window.\n\n"
    "A memory is a directory. [bold]mc ingest[/] puts texts into it, [bold]mc generate[/] asks one question, "
    "[bold]mc chat[/] goes on with a conversation that survives a restart, [bold]mc inspect[/] shows what it holds, "
    "[bold]mc serve[/] answers OpenAI's clients from many of them.",
)
# Titles, answers and messages are shown as they are: brackets and colons in them are text, lines are not broken.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

Memory = Annotated[Path, typer.Argument(help="Directory of the memory; made if it does not exist.", show_default=False)]
Model = Annotated[
    str, typer.Option(help="[bold]smollm2-135m[/], a Hugging Face directory or hub name, or a .gguf file.")
]
Budget = Annotated[int, typer.Option(help="Cache slots that the model attends to, however long the history.")]
Policy = Annotated[
    str,
    typer.Option(
        help="What decides where detail goes: blend, retrieval, attention, recency, retrieval+recency, hindsight, "
        "lensnet, lensnet+retrieval."
    ),
]
EngineName = Annotated[str, typer.Option("--engine", help="What runs the model: native or transformers.")]
GistKind = Annotated[str, typer.Option(help="What a gist is in the cache: pooled, projected or embedding.")]
Refresh = Annotated[str, typer.Option(help="What is recomputed after an edit: none, tail, top or full.")]
# Documents, or turns, that are shown where there are more: the newest.
SHOWN = 20
# Exit code of a command that Ctrl-C ended, as shells have it.
INTERRUPTED = 130
SHIPPED_GISTS = Path(SHIPPED)
Gistnet = Annotated[
    Path, typer.Option(help="Gists: a safetensors file, `shipped` (the package's, if it has some) or `untrained`.")
]
Lensnet = Annotated[
    Path | None, typer.Option(help="Weights (safetensors) for the policies of lensnet.", show_default="the package's")
]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from so many tokens at most; 0: no limit.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")]
Stats = Annotated[bool, typer.Option("--stats", help="Show slots, edits and times after each answer.")]


def _open(memory: Path, model: str, **settings: Any) -> Any:
    from .session import Session  # torch takes seconds to import; `mc --help` does not need it

    with err.status("loading the model"):
        return Session.open(memory, model, **settings)


@app.command()
def ingest(
    memory: Memory,
    sources: Annotated[list[Path], typer.Argument(help="UTF-8 text files, or - for standard input.")],
    fast: Annotated[bool, typer.Option("--fast", help="Encode with GistNet alone, without the model.")] = False,
    title: Annotated[str | None, typer.Option(help="Name of the document.", show_default="the file's name")] = None,
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    gistnet: Gistnet = SHIPPED_GISTS,
) -> None:
    """Read texts into a memory.

    Each file becomes one document, wholly or not at all. Example: [bold]mc ingest memory/ book.txt notes.md[/]
    """
    from .sources import read_source, read_text

    for source in sources:  # what is not there is said before the model is loaded
        if str(source) != "-" and (source.is_dir() or not source.exists()):
            read_text(source)
    with _open(memory, model, budget=budget, gistnet=gistnet) as session:
        for source in sources:
            text = [_typed()] if str(source) == "-" else source  # pieces are text, also where they look like a path
            read = read_source(text, session.model.tokenizer, title=title)
            with Progress(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"),
                TimeElapsedColumn(), TimeRemainingColumn(), console=err,
            ) as bar:  # fmt: skip
                task = bar.add_task(printable(read.title[:40]), total=len(read.ids))
                document = session.ingest_source(
                    read, mode="fast" if fast else "contextual", progress=lambda n, t=task: bar.update(t, completed=n)
                )
            out.print(f"{printable(document.title)}: tokens {document.start:,} to {document.stop:,}", soft_wrap=True)


@app.command()
def generate(
    memory: Memory,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    policy: Policy = "blend",
    gist_kind: GistKind = "pooled",
    refresh: Refresh = "full",
    engine: EngineName = "native",
    gistnet: Gistnet = SHIPPED_GISTS,
    lensnet: Lensnet = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
) -> None:
    """Ask one question; question and answer become part of the memory.

    Example: [bold]mc generate memory/ "Who keeps the lighthouse?" -n 64[/]
    """
    settings = {"budget": budget, "policy": policy, "gist_kind": gist_kind, "refresh": refresh}
    settings |= {"gistnet": gistnet, "lensnet": lensnet, "engine": engine}
    with _open(memory, model, **settings) as session:
        text = _typed() if prompt == "-" else prompt
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop or []}
        whole = _answer(session, text, stats, max_new_tokens=max_new_tokens, **sampling)
    if not whole:
        raise typer.Exit(INTERRUPTED)


@app.command()
def chat(
    memory: Memory,
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    policy: Policy = "blend",
    gist_kind: GistKind = "pooled",
    refresh: Refresh = "full",
    engine: EngineName = "native",
    gistnet: Gistnet = SHIPPED_GISTS,
    lensnet: Lensnet = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stats: Stats = False,
) -> None:
    """Talk. The conversation is part of the memory and goes on where it stopped, also after a restart.

    [bold]/map[/] shows where the memory looks ([bold]/map all[/]: at every turn), [bold]/search words[/] what matches,
    [bold]/focus words[/] brings it into detail, [bold]/quit[/] ends.
    """
    settings = {"budget": budget, "policy": policy, "gist_kind": gist_kind, "refresh": refresh}
    settings |= {"gistnet": gistnet, "lensnet": lensnet, "engine": engine}
    with _open(memory, model, **settings) as session:
        with suppress(ImportError):  # some Pythons are built without it
            import readline  # noqa: F401  (gives `input` a line that can be edited, and a history)
        out.print(f"{session.tree.length:,} tokens remembered. /map, /search words, /focus words, /quit")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    return
                if command == "/map":
                    last = None if rest.strip() == "all" else SHOWN
                    out.print(inspection.newest_frames(session.focus_map(), last), soft_wrap=True)
                elif command == "/search":
                    inspection.print_hits(out, session.search(rest))
                elif command == "/focus":
                    session.focus_on(rest or None)
                elif command.startswith("/"):
                    err.print(f"unknown command {printable(command)}; there are /map, /search, /focus, /quit")
                elif line:
                    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
                    _answer(session, line, stats, max_new_tokens=max_new_tokens, **sampling)
            except MegaContextError as error:
                err.print(printable(str(error)), style="red", soft_wrap=True)


def _typed() -> str:
    from .sources import decode_text

    return decode_text(sys.stdin.buffer.read(), "standard input")


def _answer(session: Any, prompt: str, stats: bool, **sampling: Any) -> bool:
    """Whether the answer came to its end."""
    whole = True
    pieces = session.generate(prompt, stream=True, **sampling)
    try:
        for piece in pieces:
            # `print` would turn tabs into spaces. What is no terminal gets the answer as it is.
            out.file.write(printable(piece, keep="\n\t") if out.file.isatty() else piece)
            out.file.flush()
    except KeyboardInterrupt:  # ends this answer, not the conversation
        whole = False
        err.print(" (interrupted)", style="dim", end="")
    finally:
        pieces.close()
    out.print()
    if stats:
        err.print(inspection.turn_line(session.stats()))
    return whole


@app.command()
def inspect(
    memory: Annotated[Path, typer.Argument(help="Directory of the memory.", show_default=False)],
    columns: Annotated[int, typer.Option(min=1, help="Width of the focus map.")] = 96,
    last: Annotated[int, typer.Option(min=1, help="How many documents to list, the newest.")] = SHOWN,
    everything: Annotated[bool, typer.Option("--all", help="List all documents.")] = False,
) -> None:
    """Show the tree, its levels and documents, and where the memory looked last. Works while another process writes."""
    from .tree import Tree

    with Tree.open(memory, mode="r") as tree:
        out.print(inspection.overview(tree), soft_wrap=True)
        table = Table("level", "nodes", "one covers", "pooled", "fast", title="levels", title_justify="left")
        for row in inspection.level_rows(tree):
            table.add_row(*row)
        out.print(table)
        columns_of = ("id", "kind", "title", "tokens", "from", "to", "ingest")
        documents = Table(*columns_of, title="documents", title_justify="left")
        for row in inspection.document_rows(tree, None if everything else last):
            documents.add_row(*row)
        out.print(documents)
        more = inspection.left_out(documents.row_count, tree.count_documents(), "documents", "--all")
        if more:
            out.print(more)
        out.print(inspection.saved_focus_map(tree, columns), soft_wrap=True)


app.command()(serve)
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")


def main() -> None:
    """Entry point: errors that a user can act on are one line and exit code 2, as those of usage are."""
    if isinstance(sys.stdout, TextIOWrapper):  # a terminal that lacks a character shows another, and goes on
        sys.stdout.reconfigure(errors="replace")
    if isinstance(sys.stdin, TextIOWrapper):  # bytes that are no text are refused like any that no model can read
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        app()
    except MegaContextError as error:
        err.print(f"mc: {printable(str(error))}", style="red", soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
