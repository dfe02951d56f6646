"""Is the time per decoded token flat? Two memories of very different length, one budget, decoding in alternation.

    python bench/decode_latency.py [--tokens 2000 --tokens 100000] [--budget 2048] [--steps 128]

Prints the median time of a decode step and of a refocus for each length, and their ratio to the shortest. The text is
the book of the demo, ingested without the model; what a decode step costs depends on the slots in use alone.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "book"))

from fetch import fetch_book

from mc_runtime import Session
from mc_runtime.model import DEFAULT_MODEL, cache_dir, load_model

QUESTION = "Tell me a long story about what happened to the king, his daughter and the fox."


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="Lengths of the histories.")] = None,
    budget: Annotated[int, typer.Option(help="Slots of each Working Context.")] = 2048,
    steps: Annotated[int, typer.Option(help="Tokens to decode in each memory.")] = 128,
    model: Annotated[str, typer.Option(help="Model name, directory or GGUF file.")] = DEFAULT_MODEL,
) -> None:
    lengths = sorted(tokens or [2_000, 100_000])
    loaded = load_model(model)
    ids = loaded.tokenizer.encode(fetch_book(cache_dir() / "book").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sessions = []
        for length in lengths:
            session = stack.enter_context(Session.open(Path(folder) / str(length), loaded, budget=budget))
            whole = (ids * (length // len(ids) + 1))[:length]
            session.ingest(whole, mode="fast")
            sessions.append(session)
        # The end token would stop one memory before the other: a seed and a temperature keep them talking.
        streams = [s.generate(QUESTION, stream=True, max_new_tokens=steps, temperature=1.0, seed=1) for s in sessions]
        while streams:
            streams = [stream for stream in streams if next(stream, None) is not None]
        table = Table("tokens in the tree", "slots used", "ms per token", "ratio", "steps", "ms per refocus")
        base = None
        for session in sessions:
            stats = session.stats()
            turn = stats.turns[-1]
            base = base or turn.seconds_per_token
            spread = statistics.quantiles(turn.decode, n=4)
            table.add_row(
                f"{stats.tokens:,}",
                f"{stats.used:,}",
                f"{turn.seconds_per_token * 1e3:.1f} ({spread[0] * 1e3:.1f} to {spread[2] * 1e3:.1f})",
                f"{turn.seconds_per_token / base:.3f}",
                str(len(turn.decode)),
                f"{turn.seconds_per_refocus * 1e3:.0f}",
            )
        Console().print(table)


if __name__ == "__main__":
    typer.run(main)
