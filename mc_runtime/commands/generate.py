"""`mc generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    SHIPPED_GISTS,
    Budget,
    EngineName,
    GistKind,
    Gistnet,
    Lensnet,
    MaxTokens,
    Memory,
    Model,
    Policy,
    Refresh,
    Seed,
    Stats,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from .terminal import INTERRUPTED, answer, open_memory, typed


def generate(
    memory: Memory,
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from standard input.")],
    model: Model = "smollm2-135m",
    budget: Budget = 2048,
    policy: Policy = "retrieval",
    gist_kind: GistKind = "pooled",
    refresh: Refresh = "text",
    engine: EngineName = "native",
    gistnet: Gistnet = SHIPPED_GISTS,
    lensnet: Lensnet = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
) -> None:
    """Ask one question; question and answer become part of the memory.

    Example: [bold]mc generate memory/ "Who keeps the lighthouse?" -n 64[/]
    """
    settings = {"budget": budget, "policy": policy, "gist_kind": gist_kind, "refresh": refresh}
    settings |= {"gistnet": gistnet, "lensnet": lensnet, "engine": engine}
    with open_memory(memory, model, **settings) as session:
        text = typed() if prompt == "-" else prompt
        sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed, "stop": stop or []}
        whole = answer(session, text, stats, max_new_tokens=max_new_tokens, **sampling)
    if not whole:
        raise typer.Exit(INTERRUPTED)
