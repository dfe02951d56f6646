"""From what a command line says to readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from mc_runtime.config import MemoryConfig, RefreshMode
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel

from . import READERS, Reader, make_readers
from .store import MemoryStore

UNITS = {"k": 1 << 10, "m": 1 << 20}


def parse_size(text: str) -> int:
    """Tokens: "4096", "4k" (of 1,024), "1M". Raises InputError."""
    number, unit = (text[:-1], UNITS[text[-1].lower()]) if text and text[-1].lower() in UNITS else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size < 1:
        raise InputError(f"sizes: expected tokens such as 4096, 16k or 1M, got {text!r}")
    return size


def parse_names(name: str, given: str, known: Sequence[str]) -> list[str]:
    """Names with commas, each once; `all` is every one. Raises InputError for one that is not known."""
    names = list(known) if given == "all" else list(dict.fromkeys(given.split(",")))
    unknown = [n for n in names if n not in known]
    if unknown:
        raise InputError(f"{name}: expected some of {', '.join(known)}, or all, got {unknown[0]!r}")
    return names


def open_readers(
    model: LoadedModel,
    names: str,
    work: Path,
    *,
    budget: int,
    recent: int,
    refresh: str,
    gistnet: Path | None,
    lensnet: Path | None,
) -> tuple[MemoryStore, list[Reader]]:
    """names: with commas. recent, refresh: newest tokens that ours keeps at full detail, and what it recomputes after a
    question's edits. Raises InputError, BudgetError or ModelError."""
    chosen = parse_names("readers", names, READERS)
    config = MemoryConfig(budget=budget, recent_tokens=recent, refresh=cast(RefreshMode, refresh))
    store = MemoryStore(work, model, config, gistnet)
    return store, make_readers(chosen, store, lensnet)
