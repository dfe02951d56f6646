"""`mc train`: make the weights that `mc generate --gistnet --lensnet` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from mc_runtime.errors import InputError

from .ablate_command import ablate
from .average import average
from .gist_command import gist
from .joint_command import joint
from .lens_command import lens
from .replies_command import replies

app = typer.Typer(no_args_is_help=True, help="Train the nets on texts of your own; the base model stays frozen.")
app.command()(gist)
app.command()(lens)
app.command()(joint)
app.command()(ablate)
app.command()(replies)
app.command()(average)


def parse_texts(texts: Sequence[str]) -> list[tuple[Path, float]]:
    """`PATH` or `PATH=WEIGHT`; a directory stands for the .txt and .txt.xz files in it. Raises InputError."""
    found: list[tuple[Path, float]] = []
    for text in texts:
        name, _, number = text.partition("=")
        try:
            weight = float(number) if number else 1.0
        except ValueError:
            raise InputError(f"text: expected PATH=WEIGHT with a number, got {text!r}") from None
        if not weight > 0:
            raise InputError(f"text: expected a positive weight, got {text!r}")
        path = Path(name)
        files = sorted(p for p in path.iterdir() if p.name.endswith((".txt", ".txt.xz"))) if path.is_dir() else [path]
        if not files:
            raise InputError(f"{path}: holds no .txt or .txt.xz file")
        found += [(file, weight) for file in files]
    return found
