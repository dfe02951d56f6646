"""The pictures of a run of the ops. Importing this package does not import matplotlib, which is optional."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
import typer
from rich.console import Console

from ..rows import Report

# Each has measure(device) -> dict and draw(data, path).
MEASURED = ("splice_tail", "drift")


def require_matplotlib() -> None:
    """Raises typer.BadParameter, which the command line shows as one line, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise typer.BadParameter("--plot: needs matplotlib; install it with `pip install megacontext[plot]`")


def draw(report: Report, folder: Path, device: torch.device, console: Console) -> list[Path]:
    """Write roofline.png of `report`, measure and draw splice_tail.png and drift.png with their data beside them as
    JSON, print the paths and return them. Raises typer.BadParameter where matplotlib is missing, before measuring."""
    require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "roofline.png"]
    import_module(".roofline", __name__).roofline(report, paths[0])
    for name in MEASURED:
        picture = import_module(f".{name}", __name__)
        with console.status(f"measuring {name}"):
            data = picture.measure(device)
        figure, saved = folder / f"{name}.png", folder / f"{name}.json"
        saved.write_text(json.dumps(data, indent=1) + "\n")
        picture.draw(data, figure)
        paths += [figure, saved]
    for path in paths:
        console.print(str(path), highlight=False, soft_wrap=True)
    return paths
