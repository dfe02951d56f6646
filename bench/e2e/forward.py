"""`python bench/run.py forward`: what a forward of N rows takes, from a decode step to a chunk of a text that is read.

The native engine over a slot cache, which is how a memory decodes, opens passages and reads; and Transformers over its
own cache, with the same weights, in alternation. Both give the logits of the last row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.dtypes import DTYPES
from bench.e2e.history import made_up_text
from bench.e2e.report import Spread
from bench.e2e.transformers_window import missing
from mc_kernels import native
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import DEFAULT_MODEL, Decoder, load_model

UNTIMED = 1


def _native(decoder: Decoder, ids: Tensor, entries: int) -> Callable[[int], Tensor]:
    """Run so many of `ids` [N] behind the first `entries`, which have been read; returns logits [vocab]."""
    cache = KVCache.allocate(decoder.config, len(ids), dtype=decoder.dtype, device="cpu")

    def run(rows: int, first: int = entries) -> Tensor:
        slots = torch.arange(first, first + rows)
        cache.pos[0, slots] = slots
        x = decoder.embed(ids[None, first : first + rows])
        output = decoder(x, slots[None], cache.writer(slots[None], first + rows), logits=True)
        assert output.logits is not None
        return output.logits[0]

    run(entries, 0)
    return run


def _transformers(decoder: Decoder, ids: Tensor, entries: int) -> tuple[Callable[[int], Tensor], Callable[[int], None]]:
    """The same, and what takes so many rows out of its cache again."""
    from transformers import DynamicCache

    from mc_runtime.engines.hf_model import transformers_model

    model: Any = transformers_model(decoder)
    cache: Any = DynamicCache(config=model.config)

    def run(rows: int, first: int = entries) -> Tensor:
        taken = ids[None, first : first + rows]
        output = model(input_ids=taken, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits[0, -1]
        return logits

    run(entries, 0)
    return run, lambda rows: cache.crop(-rows)


@torch.inference_mode()
def forward(
    rows: Annotated[list[int], typer.Option(help="Rows of a forward; repeat for several.")] = [1, 8, 32, 64, 256, 1024],  # noqa: B006
    entries: Annotated[int, typer.Option(help="Entries that stand before them.")] = 700,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16. [default: the model's on this machine]")] = "",
    repeats: Annotated[int, typer.Option(help="Forwards of each.")] = 7,
    model: Annotated[str, typer.Option(help="Model name, directory or GGUF file.")] = DEFAULT_MODEL,
) -> None:
    """Time a forward of so many rows on a CPU in the native engine and in Transformers. MC_CPU_ISA chooses the former's
    instruction set, OMP_NUM_THREADS the threads."""
    if min(*rows, entries, repeats) < 1:
        raise typer.BadParameter(f"expected at least 1, got --rows {rows}, --entries {entries}, --repeats {repeats}")
    if dtype and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype: expected {', '.join(DTYPES)}, got {dtype}")
    loaded = load_model(model, dtype=DTYPES.get(dtype), device="cpu")
    decoder, room = loaded.decoder, entries + max(rows)
    if room > decoder.config.max_positions:
        most = decoder.config.max_positions
        raise typer.BadParameter(f"expected at most {most} entries and rows, the model's window, got {room}")
    ids = torch.tensor((loaded.tokenizer.encode(made_up_text(room)) * 2)[:room])
    ours = _native(decoder, ids, entries)
    reason = missing()
    theirs, undo = (None, None) if reason else _transformers(decoder, ids, entries)
    name = str(decoder.dtype).removeprefix("torch.")
    isa = "no native library" if native.available() else native.library().cpu_isa()
    table = Table(title=f"{model}, {name}, {isa}, behind {entries} entries, {torch.get_num_threads()} threads")
    for heading in ("rows", "native, ms (quartiles)", "rows/s", "Transformers, ms (quartiles)", "ratio"):
        table.add_column(heading, justify="right")
    for n in rows:
        own, other = [], []
        for _ in range(repeats + UNTIMED):
            own.append(_seconds(ours, n))
            if theirs is not None and undo is not None:
                other.append(_seconds(theirs, n))
                undo(n)
        own, other = own[UNTIMED:], other[UNTIMED:]
        ratio = f"{np.median(np.asarray(other) / np.asarray(own)):.2f}" if other else "-"
        spread = Spread.of(own, 1e3)
        table.add_row(f"{n:,}", spread.text(), f"{n / np.median(own):,.0f}", Spread.of(other, 1e3).text(), ratio)
    console = Console()
    console.print(table)
    if reason:
        console.print(f"Transformers skipped: {reason}")


def _seconds(run: Callable[[int], Tensor], rows: int) -> float:
    begin = time.perf_counter()
    run(rows)
    return time.perf_counter() - begin
