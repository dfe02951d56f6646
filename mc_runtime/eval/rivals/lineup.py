"""Which arms run at which ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mc_runtime.config import GistKind
from mc_runtime.errors import InputError
from mc_runtime.gistnet import GistNet, Projector
from mc_runtime.model import LoadedModel

from . import Rival
from .bm25 import BM25Append
from .centred_mean import centred_mean
from .compressive import MeanKV
from .gist_tokens import GistTokens
from .gists import EmbeddingGists, PooledGists, ProjectedGists
from .infllm import InfLLM
from .memorizing import Memorizing
from .random_tokens import RandomTokens
from .recency import Recency
from .retro import Retro
from .snapkv import SnapKV

# By the name that the command line knows them by: (model, ratio, block size) -> arms.
RIVALS: dict[str, Callable[[LoadedModel, int, int], list[Rival]]] = {
    "random": lambda model, ratio, size: [RandomTokens()],
    "recency": lambda model, ratio, size: [Recency(), Recency(4)],
    "mean-kv": lambda model, ratio, size: [MeanKV()],
    "mean-embedding": lambda model, ratio, size: [centred_mean(model.decoder, ratio, size)],
    "snapkv": lambda model, ratio, size: [SnapKV(), SnapKV(5), SnapKV(7)],
    "bm25": lambda model, ratio, size: [BM25Append(model.tokenizer), BM25Append(model.tokenizer, 32)],
    "retro": lambda model, ratio, size: [Retro(model.tokenizer)],
    "knn": lambda model, ratio, size: [Memorizing()],
    "infllm": lambda model, ratio, size: [InfLLM(), InfLLM(1)],
}


def rivals_for(
    names: Sequence[str], model: LoadedModel, ratio: int, size: int, tokens: Sequence[GistTokens] = ()
) -> list[Rival]:
    """Rivals by name, and the trained gist tokens among `tokens` that fit the ratio. Raises InputError for a name."""
    unknown = [name for name in names if name not in RIVALS]
    if unknown:
        raise InputError(f"rivals: expected some of {', '.join(RIVALS)}, got {unknown[0]!r}")
    chosen = [rival for name in names for rival in RIVALS[name](model, ratio, size)]
    return chosen + [trained for trained in tokens if trained.ratio == ratio]


def ours_for(kinds: Sequence[GistKind], net: GistNet, label: str, ratio: int, size: int) -> list[Rival]:
    """The arms that a GistNet gives at a ratio: level 1 where its gists per block fit, higher levels at powers of the
    block size. Raises InputError for a kind that it is not trained for."""
    arms: list[Rival] = []
    level = next((i for i in range(1, 5) if size**i == ratio), None)
    if "pooled" in kinds:
        # Levels above the trained ones are means, where there is one gist per block.
        above = 4 if net.pool_weights[-1].n_gists == 1 else 0
        levels = [net.weights_of(level) for level in range(1, len(net.pool_weights) + above + 1)]
        for top, weights in enumerate(levels, start=1):
            if size**top == ratio * weights.n_gists:
                name = "pooled gists" if top == 1 else f"pooled gists, level {top}"
                arms.append(PooledGists(name + label, levels[:top]))
                if net.gist_bias:
                    arms.append(PooledGists(f"{name}, as a memory weighs them{label}", levels[:top], net.gist_bias))
                break
    suffix = label if level in (None, 1) else f", level {level}{label}"
    if "projected" in kinds:
        if not isinstance(net.projector, Projector):
            raise InputError("kinds: this GistNet has no trained projector, so no projected gists")
        if level is not None:
            arms.append(ProjectedGists(f"projected gists{suffix}", net, size, level))
    if "embedding" in kinds and level is not None:
        arms.append(EmbeddingGists(f"embedding gists{suffix}", net, size, level))
    return arms
