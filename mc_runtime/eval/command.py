"""`mc eval`: what the memory keeps, on texts that it was not trained on. One file per subcommand in `commands/`."""

from __future__ import annotations

import typer

from .commands.focus import focus
from .commands.gist_tokens import gist_tokens
from .commands.layout import layout
from .commands.needle import needle
from .commands.pivot import pivot
from .commands.staleness import staleness
from .commands.substitutability import substitutability
from .commands.table import table

app = typer.Typer(no_args_is_help=True, help="Measure what the memory keeps, beside rivals at equal slots.")

# Their modules import torch and what else takes long only when they run: `mc --help` reads all of them.
for command in (substitutability, gist_tokens, table, needle, pivot, focus, staleness, layout):
    app.command()(command)
