"""`mc serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..sampling import SamplingParams
from ..shipped import SHIPPED

SHIPPED_GISTS = Path(SHIPPED)


def serve(
    root: Annotated[Path, typer.Argument(help="Directory of the memories; made if it does not exist.")],
    host: Annotated[str, typer.Option(help="Address to listen on. Any but loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="MC_SERVE_TOKEN",
            help="What clients give as API key. Other users see it in the list of processes: "
            "better in the environment.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="[bold]smollm2-135m[/], a Hugging Face directory or hub name, or a .gguf file.")
    ] = "smollm2-135m",
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the model's, without directories")
    ] = None,
    budget: Annotated[
        int, typer.Option(help="Cache slots that the model attends to, however long the history.")
    ] = 2048,
    policy: Annotated[str, typer.Option(help="What decides where detail goes; see `mc chat --help`.")] = "retrieval",
    gistnet: Annotated[
        Path, typer.Option(help="Gists: a safetensors file, `shipped` (the package's) or `untrained`.")
    ] = SHIPPED_GISTS,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Of a request that sets none.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of a request that sets none.")] = 0.0,
    max_memories: Annotated[int, typer.Option(help="Memories in the directory.")] = 1000,
    max_memory_tokens: Annotated[int, typer.Option(help="Tokens of one memory.")] = 10_000_000,
    max_request_bytes: Annotated[int, typer.Option(help="Size of a request.")] = 4 * 2**20,
    max_requests: Annotated[int, typer.Option(help="Requests under way or waiting; more are refused.")] = 32,
    max_open: Annotated[int, typer.Option(help="Memories open at the same time, each with its cache.")] = 8,
) -> None:
    """Serve memories to OpenAI's clients.

    POST /v1/chat/completions answers from the memory that the header X-Session-ID or the field [bold]user[/] names;
    GET /v1/models, /health. Example: [bold]mc serve memories/[/]
    """
    try:
        from .server import Server
        from .settings import ServeSettings
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed; pip install 'megacontext[serve]'") from error
    from ..model import load_model

    settings = ServeSettings(
        root=root, model_name=model_name or Path(model).name, host=host, port=port, token=token,
        session={"budget": budget, "policy": policy, "gistnet": gistnet},
        sampling=SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature),
        max_memories=max_memories, max_memory_tokens=max_memory_tokens, max_request_bytes=max_request_bytes,
        max_requests=max_requests, max_open=max_open,
    )  # fmt: skip
    settings.make_root()  # before the model is loaded, which takes seconds
    try:
        Server(settings, load_model(model)).run()
    except KeyboardInterrupt:  # uvicorn has ended well by then
        raise SystemExit(0) from None
