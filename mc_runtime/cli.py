"""The command `mc`: remember texts, ask them, look into a memory."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from .commands.chat import chat
from .commands.generate import generate
from .commands.ingest import ingest
from .commands.inspect import inspect
from .commands.terminal import err
from .commands.version import show_version
from .errors import MegaContextError
from .eval.command import app as eval_app
from .printable import printable
from .serve.command import serve
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


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    """What stands before a command; the help text is the app's own."""


for command in (ingest, generate, chat, inspect, serve):
    app.command()(command)
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
