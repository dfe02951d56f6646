"""`python bench/run.py engines`: what a decode step takes in each engine of this machine, over the same weights.

In alternation, as in `decode.py`. transformers' own is a plain loop of forwards over its own cache, without us.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.e2e.history import made_up_text
from bench.e2e.report import Spread
from bench.e2e.transformers_window import TransformersWindow, missing
from mc_runtime.engines import make_engine
from mc_runtime.model import DEFAULT_MODEL, LoadedModel, load_model

PLAIN = "transformers, its own cache"
UNTIMED = 3


def _readings(model: LoadedModel, ids: Tensor, room: int) -> dict[str, Callable[[], None]]:
    """Engine -> decode one more token behind `ids` [N], which it has read."""
    from mc_runtime.engines.hf_model import transformers_model

    steps: dict[str, Callable[[], None]] = {}
    for name in ("native", "transformers"):
        engine = make_engine(name, model.decoder)
        reading = engine.prefill(engine.embed(ids[None])[0], room=room)
        steps[name] = lambda reading=reading: reading.decode(int(reading.logits.argmax()))  # type: ignore[misc]
    window = TransformersWindow(transformers_model(model.decoder), len(ids) + room, static=False)
    window.read(ids.tolist())
    return {**steps, PLAIN: window.step}


@torch.inference_mode()
def engines(
    entries: Annotated[int, typer.Option(help="Entries that stand before the first token.")] = 1024,
    steps: Annotated[int, typer.Option(help="Tokens to decode with each.")] = 48,
    model: Annotated[str, typer.Option(help="Model name, directory or GGUF file.")] = DEFAULT_MODEL,
) -> None:
    """Time a decode step of the native engine, of Transformers' modules over our cache, and of Transformers alone."""
    if min(entries, steps) < 1:
        raise typer.BadParameter(f"--entries, --steps: expected at least 1, got {entries} and {steps}")
    if (reason := missing()) is not None:
        raise typer.BadParameter(f"the engine transformers cannot run: {reason}")
    loaded = load_model(model)
    ids = torch.tensor((loaded.tokenizer.encode(made_up_text(entries)) * 2)[:entries])
    console = Console()
    runs = _readings(loaded, ids, steps + UNTIMED)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps + UNTIMED):
        for name, step in runs.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    dtype = str(loaded.decoder.dtype).removeprefix("torch.")
    table = Table(title=f"{model}, {dtype}, {entries} entries, {torch.get_num_threads()} threads")
    for heading in ("engine", "ms a token (quartiles)", "of native"):
        table.add_column(heading)
    native = np.asarray(seconds["native"][UNTIMED:])
    for name, taken in seconds.items():
        own = np.asarray(taken[UNTIMED:])
        table.add_row(name, Spread.of(own.tolist(), 1e3).text(), f"{np.median(own / native):.2f}")
    console.print(table)
