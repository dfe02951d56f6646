"""`mc eval focus`: how good a choice of what to open is."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mc_runtime.errors import InputError

from .shared import Model, Out, Plot, Seed, Texts, check_at_least, err_console, out_console, progress_bar

if TYPE_CHECKING:
    from torch import Tensor


def focus(
    texts: Texts,
    gistnet: Annotated[Path, typer.Option(help="Trained gists.")],
    lensnet: Annotated[Path | None, typer.Option(help="Trained LensNet.", show_default="rivals only")] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="Held-out questions in SQuAD's format.", show_default="none")
    ] = None,
    model: Model = "smollm2-135m",
    far: Annotated[int, typer.Option(help="Tokens that stand as gists, a multiple of 32.")] = 1024,
    recent: Annotated[int, typer.Option(help="Tokens in full detail.")] = 64,
    targets: Annotated[int, typer.Option(help="Tokens whose likelihood is measured.")] = 64,
    opened: Annotated[int, typer.Option(help="Blocks that each selector opens.")] = 4,
    n: Annotated[int, typer.Option("-n", help="Contexts per text.")] = 100,
    seed: Seed = 1,
    out: Out = None,
    plot: Plot = None,
) -> None:
    """Open a few of many gists: what LensNet's choice and that of hindsight gain beside attention mass, BM25, recency,
    chance, and the measured best, and beside rivals that fill as many slots with exact tokens.

    Example: mc eval focus held-out/ --gistnet gist.safetensors --lensnet lens.safetensors --out focus.json
    """
    from mc_runtime.config import MemoryConfig
    from mc_runtime.gistnet import GistNet
    from mc_runtime.lensnet import LensNet
    from mc_runtime.model import cache_dir, load_model
    from mc_runtime.train.command import parse_texts
    from mc_runtime.train.corpus import Corpus
    from mc_runtime.train.lens_questions import read_articles

    from ..focus import Asking, FocusResult, FocusSetting, focus_regret
    from ..focus_report import rows, to_dict
    from ..focus_windows import draw_asking
    from ..pasts import draw_windows
    from ..rivals import Rival
    from ..rivals.bm25 import BM25Append
    from ..rivals.recency import Recency
    from ..rivals.snapkv import SnapKV
    from ..selectors import AtRandom, ByAttention, ByBM25, ByHindsight, ByLensNet, ByRecency, Selector

    size = MemoryConfig().block_size
    if far < 2 * size or far % size:
        raise InputError(f"far: expected a multiple of {size} of at least {2 * size}, got {far}")
    check_at_least(2, targets=targets)
    check_at_least(1, recent=recent, n=n, opened=opened)
    if opened > far // size:
        raise InputError(f"opened: expected at most the {far // size} blocks of the past, got {opened}")
    files = parse_texts(texts)
    loaded = load_model(model)
    net = GistNet.load(gistnet, loaded.decoder, size)
    selectors: list[Selector] = [ByHindsight(), ByRecency(), ByAttention(), ByBM25(), AtRandom(seed)]
    if lensnet is not None:
        selectors.insert(0, ByLensNet(LensNet.load(lensnet, loaded.decoder), loaded, net))
    rivals: list[Rival] = [SnapKV(), Recency(), BM25Append(loaded.tokenizer)]
    setting = FocusSetting(far, recent, targets, opened, n, seed, gist_bias=net.gist_bias)
    results: list[FocusResult] = []
    try:
        with progress_bar() as bar:

            def measure(name: str, windows: Tensor, asking: Asking | None = None) -> None:
                results.append(FocusResult(name))
                advance = partial(bar.advance, bar.add_task(name, total=n))
                focus_regret(
                    loaded, net.pool_weights, results[-1], windows, selectors, rivals, setting, asking, advance
                )

            for path, _ in files:
                corpus = Corpus.open(path, loaded.tokenizer, cache_dir() / "tokens")
                measure(corpus.name, draw_windows(corpus, n, far + recent, targets, seed).to(loaded.decoder.device))
            for path in questions or []:
                measure(
                    f"questions ({path.name.split('.')[0]})", *draw_asking(loaded, read_articles(path), setting, size)
                )
    except KeyboardInterrupt:
        err_console.print("interrupted; what follows is of the contexts that were measured")
    results = [result for result in results if result.nll]
    table = Table(
        "text", "arm", "slots", "nats per token", "gain", "of the oracle's", "recovery", "rank corr.", "found"
    )
    for result in results:
        for row in rows(result, setting, size):
            table.add_row(*row)
    out_console.print(table)
    if plot is not None and results:
        from ..focus_plot import draw_focus

        draw_focus(results, plot, f"{opened} of {far // size} blocks opened, n = {n} per text; {model}")
    if out is not None:
        report: dict[str, Any] = {
            "schema": "megacontext/focus/1",
            "model": model,
            "model_fingerprint": loaded.fingerprint,
            "gistnet": {"file": gistnet.name, "fingerprint": net.fingerprint},
            "lensnet": None if lensnet is None else {"file": lensnet.name},
            "setting": asdict(setting),
            "texts": [to_dict(result) for result in results],
        }
        out.write_text(json.dumps(report, indent=1) + "\n")
