"""`mc eval layout`: what a policy's layout of a long history is worth beside as many of the newest tokens."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.box import SIMPLE
from rich.table import Table

from mc_runtime.errors import InputError

from .shared import Model, Out, Plot, Seed, Texts, err_console, out_console, progress_bar


def layout(
    texts: Texts,
    gistnet: Annotated[Path | None, typer.Option(help="Trained gists.", show_default="untrained")] = None,
    lensnet: Annotated[Path | None, typer.Option(help="Trained LensNet.", show_default="none")] = None,
    policies: Annotated[
        str | None,
        typer.Option(
            help="Names with commas, as in `mc generate --policy`.",
            show_default="all, and with --lensnet lensnet,lensnet+retrieval",
        ),
    ] = None,
    model: Model = "smollm2-135m",
    history: Annotated[int, typer.Option(help="Tokens of text before the first measuring point.")] = 16384,
    budget: Annotated[int, typer.Option(help="Cache slots.")] = 2048,
    recent: Annotated[int, typer.Option(help="Newest tokens, always in full.")] = 64,
    targets: Annotated[int, typer.Option(help="Tokens whose likelihood is measured.")] = 64,
    every: Annotated[int, typer.Option(help="Tokens from one measuring point to the next.")] = 1024,
    points: Annotated[int, typer.Option(help="Measuring points that one history serves, at most.")] = 4,
    cycles: Annotated[
        int, typer.Option(help="Blocks read before each point with a refocus after each, as while decoding.")
    ] = 4,
    refresh: Annotated[str, typer.Option(help="After each refocus: none, tail, top, text or full.")] = "full",
    n: Annotated[int, typer.Option("-n", help="Measuring points per text.")] = 34,
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Lay out a long history in few slots: NLL of the next true tokens under each focus policy, with nothing opened,
    and with as many slots of the newest tokens, paired at the same points, with 95% bootstrap intervals; and how much
    each policy's refocuses change.

    Example: mc eval layout held-out/ --gistnet gist.safetensors --lensnet lens.safetensors --out layout.json
    """
    from mc_runtime.config import MemoryConfig, RefreshMode
    from mc_runtime.focus import LENSNET_POLICIES, POLICIES, FocusPolicy, make_policy
    from mc_runtime.lensnet import LensNet
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus

    from .. import layout_report as reports
    from ..layout import LayoutResult, LayoutSetting, measure_layouts

    size = MemoryConfig().block_size
    setting = LayoutSetting(
        history, budget, recent, targets, every, points, cycles, cast(RefreshMode, refresh), n, seed, size
    )
    names = [*(LENSNET_POLICIES if lensnet is not None else ()), *POLICIES]
    if policies is not None:
        names = list(dict.fromkeys(policies.split(",")))
    if lensnet is not None and not any(name in LENSNET_POLICIES for name in names):
        raise InputError(f"lensnet: expected one of {', '.join(LENSNET_POLICIES)} among the policies, got {policies!r}")
    files = parse_texts(texts)
    loaded = load_model(model)
    net = None if lensnet is None else LensNet.load(lensnet, loaded.decoder)
    chosen: dict[str, FocusPolicy] = {name: make_policy(name, net) for name in names}
    results: list[LayoutResult] = []
    try:
        with progress_bar() as bar:
            for path, _ in files:
                corpus = Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens")
                task = bar.add_task(corpus.name, total=n)
                results.append(LayoutResult(corpus.name))
                measure_layouts(loaded, corpus, chosen, setting, results[-1], gistnet, partial(bar.advance, task))
    except KeyboardInterrupt:
        err_console.print("interrupted; what follows is of the points that were measured")
    title = f"{history:,} to {history + (points - 1) * every:,} tokens in {setting.slots:,} slots"
    table = Table(
        "text", "arm", "slots", "of these tokens", "nats per token", "against recency",
        title=title, title_justify="left", box=SIMPLE,
    )  # fmt: skip
    restless = Table(
        "text", "policy", "cycles", "changed per block", "residency", "shortest", "closed", "recomputed",
        title=f"edits of a refocus, per {size} slots in use; residency of opened blocks in refocus cycles",
        title_justify="left", box=SIMPLE,
    )  # fmt: skip
    for result in reports.with_overall(results):
        for row in reports.rows(result):
            table.add_row(*row)
        for row in reports.swap_rows(result, size):
            restless.add_row(*row)
    out_console.print(table)
    out_console.print(restless)
    if out is not None:
        about: dict[str, Any] = {
            "model": model,
            "model_fingerprint": loaded.fingerprint,
            "dtype": str(loaded.decoder.dtype).removeprefix("torch."),
            "gistnet": None if gistnet is None else gistnet.name,
            "lensnet": None
            if net is None or lensnet is None
            else {"file": lensnet.name, "fingerprint": net.fingerprint},
            "policies": names,
        }
        out.write_text(json.dumps(reports.to_dict(about, results, setting), indent=1) + "\n")
    if plot is not None and any(result.points for result in results):
        reports.draw(results, plot, f"{title}; {model}")
