"""What `mc --version` says: this package, and what its kernels run on here."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
import typer

from mc_kernels import extension


def version_lines() -> list[str]:
    """The package's version; Python's and torch's; the native library's level of instructions, or why there is none."""
    missing = extension.available()
    native = f"C++ ({extension.library().cpu_isa()})" if missing is None else f"PyTorch ({missing})"
    return [
        f"megacontext {version('megacontext')}",
        f"Python {platform.python_version()}, torch {torch.__version__}",
        f"CPU kernels: {native}",
    ]


def show_version(asked: bool) -> None:
    """Print the lines and end, where they were asked for."""
    if asked:
        typer.echo("\n".join(version_lines()))
        raise typer.Exit
