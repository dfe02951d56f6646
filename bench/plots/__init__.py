"""The pictures of a run of the ops."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ..rows import Report


def draw(report: Report, folder: Path, device: torch.device, console: Console) -> list[Path]:
    """Draw what belongs to `report` into `folder`; returns the files."""
    raise NotImplementedError
