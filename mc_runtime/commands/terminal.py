"""The consoles of `mc`, and what goes through them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from .. import inspection
from ..printable import printable

# Titles, answers and messages are shown as they are: brackets and colons in them are text, lines are not broken.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)
# Documents, or turns, that are shown where there are more: the newest.
SHOWN = 20
# Exit code of a command that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


def open_memory(memory: Path, model: str, **settings: Any) -> Any:
    """A session over a memory, with a word on what takes so long."""
    from ..session import Session  # torch takes seconds to import; `mc --help` does not need it

    with err.status("loading the model"):
        return Session.open(memory, model, **settings)


def typed() -> str:
    """All of standard input, which has to be text."""
    from ..sources import decode_text

    return decode_text(sys.stdin.buffer.read(), "standard input")


def answer(session: Any, prompt: str, stats: bool, **sampling: Any) -> bool:
    """Ask, and print the answer as it comes. Whether it came to its end."""
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
