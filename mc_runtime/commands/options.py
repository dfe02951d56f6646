"""The options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..shipped import SHIPPED

Memory = Annotated[Path, typer.Argument(help="Directory of the memory; made if it does not exist.", show_default=False)]
Model = Annotated[
    str, typer.Option(help="[bold]smollm2-135m[/], a Hugging Face directory or hub name, or a .gguf file.")
]
Budget = Annotated[int, typer.Option(help="Cache slots that the model attends to, however long the history.")]
Policy = Annotated[
    str,
    typer.Option(
        help="What decides where detail goes: retrieval, blend, attention, recency, retrieval+recency, hindsight, "
        "lensnet, lensnet+retrieval."
    ),
]
EngineName = Annotated[str, typer.Option("--engine", help="What runs the model: native or transformers.")]
GistKind = Annotated[str, typer.Option(help="What a gist is in the cache: pooled, projected or embedding.")]
Refresh = Annotated[str, typer.Option(help="What is recomputed after an edit: none, tail, top, text or full.")]
SHIPPED_GISTS = Path(SHIPPED)
Gistnet = Annotated[
    Path, typer.Option(help="Gists: a safetensors file, `shipped` (the package's, if it has some) or `untrained`.")
]
Lensnet = Annotated[
    Path | None, typer.Option(help="Weights (safetensors) for the policies of lensnet.", show_default="the package's")
]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(help="0 always takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample from so many tokens at most; 0: no limit.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.", show_default="random")]
Stop = Annotated[list[str] | None, typer.Option(help="Text that ends an answer; may be given several times.")]
Stats = Annotated[bool, typer.Option("--stats", help="Show slots, edits and times after each answer.")]
