"""`mc chat`."""

from __future__ import annotations

from contextlib import suppress

from .. import inspection
from ..errors import MegaContextError
from ..printable import printable
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
    Temperature,
    TopK,
    TopP,
)
from .terminal import SHOWN, answer, err, open_memory, out


def chat(
    memory: Memory,
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
    stats: Stats = False,
) -> None:
    """Talk. The conversation is part of the memory and goes on where it stopped, also after a restart.

    [bold]/map[/] shows where the memory looks ([bold]/map all[/]: at every turn), [bold]/search words[/] what matches,
    [bold]/focus words[/] brings it into detail, [bold]/quit[/] ends.
    """
    settings = {"budget": budget, "policy": policy, "gist_kind": gist_kind, "refresh": refresh}
    settings |= {"gistnet": gistnet, "lensnet": lensnet, "engine": engine}
    with open_memory(memory, model, **settings) as session:
        with suppress(ImportError):  # some Pythons are built without it
            import readline  # noqa: F401  (gives `input` a line that can be edited, and a history)
        out.print(f"{session.tree.length:,} tokens remembered. /map, /search words, /focus words, /quit")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                return
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    return
                if command == "/map":
                    last = None if rest.strip() == "all" else SHOWN
                    out.print(inspection.newest_frames(session.focus_map(), last), soft_wrap=True)
                elif command == "/search":
                    inspection.print_hits(out, session.search(rest))
                elif command == "/focus":
                    session.focus_on(rest or None)
                elif command.startswith("/"):
                    err.print(f"unknown command {printable(command)}; there are /map, /search, /focus, /quit")
                elif line:
                    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
                    answer(session, line, stats, max_new_tokens=max_new_tokens, **sampling)
            except MegaContextError as error:
                err.print(printable(str(error)), style="red", soft_wrap=True)
