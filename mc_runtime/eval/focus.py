"""How good a choice of what to open is: every gist's worth is measured, and choices are held against the best.

A past stands as gists behind the first token; each selector opens `opened` blocks of it, and the NLL of the true tokens
that follow says what that gained. Reported per text: the gain over all gists, its share of the oracle's (which opens
the blocks whose single expansions gain most), the regret in nats per token, recovery beside rivals that fill as many
slots with exact tokens, the rank correlation of scores with measured gains, and how often the choice holds the block
that is worth most, or that holds the answer to a question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.model import LoadedModel
from mc_runtime.ranks import spearman
from mc_runtime.train.lens_contexts import Scene, layout_of, make_scene
from mc_runtime.train.lens_labels import layout_nll, measured_labels
from mc_runtime.train.lens_samples import QUERY_TOKENS, observe
from mc_runtime.train.losses import nll_rows

from .pasts import Past, hidden_after, read_past
from .rivals import Rival
from .selectors import Selector

ORACLE, GISTS, FULL, WINDOW = "oracle", "gists alone", "full context", "recent window"


@dataclass(frozen=True)
class FocusSetting:
    """far tokens as gists, `recent` in full, `opened` blocks chosen, NLL over the next `targets`; n contexts a text.
    gist_bias: log-weight of gists in attention."""

    far: int = 1024
    recent: int = 64
    targets: int = 64
    opened: int = 4
    n: int = 100
    seed: int = 1
    batch: int = 4
    gist_bias: float = 0.0

    def slots(self, size: int) -> int:
        """Beyond the first token."""
        return self.far // size + self.opened * (size - 1)


@dataclass
class FocusResult:
    """text: its name. nll: by arm, [n] mean nats per target. rank, found: by selector, [n] rank correlation with the
    measured gains (NaN where undefined) and whether the choice holds the block that matters."""

    text: str
    nll: dict[str, list[float]] = field(default_factory=dict)
    rank: dict[str, list[float]] = field(default_factory=dict)
    found: dict[str, list[bool]] = field(default_factory=dict)

    def extend(self, other: FocusResult) -> None:
        """Append the contexts of another result."""
        for mine, theirs in ((self.nll, other.nll), (self.rank, other.rank)):
            for name, values in theirs.items():
                mine.setdefault(name, []).extend(values)
        for name, found in other.found.items():
            self.found.setdefault(name, []).extend(found)


@dataclass(frozen=True)
class Asking:
    """Questions in place of continuations: known answer tokens, the block that holds the answer, the question."""

    known: tuple[int, ...]
    blocks: tuple[int, ...]
    queries: tuple[str, ...]


@torch.no_grad()
def focus_regret(
    model: LoadedModel,
    pools: Sequence[GistPoolWeights],
    result: FocusResult,
    windows: Tensor,
    selectors: Sequence[Selector],
    rivals: Sequence[Rival],
    setting: FocusSetting,
    asking: Asking | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Append to `result`, a whole batch at a time, so that what an interruption leaves has every arm for every context.
    windows: [n, far + recent + targets] token ids."""
    size = pools[0].b.shape[-1]
    for first in range(0, len(windows), setting.batch):
        rows = slice(first, min(first + setting.batch, len(windows)))
        batch = FocusResult(result.text)
        past = read_past(model.decoder, windows[rows], setting.far, setting.recent)
        opened = np.zeros(setting.far // size, np.bool_)
        scene = make_scene(
            model.decoder, pools, past.ids, [layout_of(opened, size)] * past.batch, past.k, past.v, setting.recent
        )
        scene = replace(scene, gist_bias=setting.gist_bias)
        queries, answers = _queries(model, scene), [-1] * past.batch
        if asking is not None:
            scene = replace(scene, known=asking.known[rows])
            queries, answers = list(asking.queries[rows]), list(asking.blocks[rows])
        _bounds(batch, past, scene, rivals, setting.slots(size))
        samples = observe(scene, model, queries, answers)
        for row in range(past.batch):
            leaves = scene.leaves(row)
            gains = measured_labels(scene, row, leaves)[:, 0]
            legal = np.isfinite(gains).nonzero()[0]
            chosen = {ORACLE: legal[np.argsort(-gains[legal], kind="stable")[: setting.opened]]}
            for selector in selectors:
                scores = selector.scores(samples[row], leaves, scene, row)
                chosen[selector.name] = legal[np.argsort(-scores[legal], kind="stable")[: setting.opened]]
                batch.rank.setdefault(selector.name, []).append(spearman(scores[legal], gains[legal]))
            wanted = answers[row] if asking is not None else int(leaves.index[legal[gains[legal].argmax()]])
            layouts = []
            for name, places in chosen.items():
                blocks = np.zeros(len(opened), np.bool_)
                blocks[leaves.index[places]] = True
                layouts.append(layout_of(blocks, size))
                batch.found.setdefault(name, []).append(bool(blocks[wanted]))
            values = layout_nll(scene, [row] * len(layouts), layouts)
            for name, value in zip(chosen, values, strict=True):
                batch.nll.setdefault(name, []).append(float(value))
        result.extend(batch)
        progress(past.batch)


def _queries(model: LoadedModel, scene: Scene) -> list[str]:
    stop = scene.far + scene.recent
    return [model.tokenizer.decode(row[max(0, stop - QUERY_TOKENS) : stop].tolist()) for row in scene.ids]


def _bounds(result: FocusResult, past: Past, scene: Scene, rivals: Sequence[Rival], slots: int) -> None:
    """NLLs of the full context, the window, gists alone, and rivals that fill as many slots."""
    rows = range(past.batch)
    arms = {FULL: past.hidden, WINDOW: hidden_after(past, None)}
    # Of the same name as a selector may be a rival that fills the slots with single tokens.
    arms |= {f"{rival.name}, tokens": rival.follow(past, slots, True) for rival in rivals}
    for name, hidden in arms.items():
        result.nll.setdefault(name, []).extend(_nll(scene, hidden))
    result.nll.setdefault(GISTS, []).extend(layout_nll(scene, rows, scene.entries).tolist())


def _nll(scene: Scene, hidden: Tensor) -> list[float]:
    """hidden: [B, recent + targets, E] -> mean NLL of each row's known targets."""
    targets = scene.ids[:, -scene.targets :]
    nll = nll_rows(hidden[:, scene.recent - 1 : -1].flatten(0, 1), targets.flatten(), scene.decoder.head)
    known = scene.known_targets(range(len(targets)))
    values: list[float] = ((nll.view(targets.shape) * known).sum(1) / known.sum(1)).double().tolist()
    return values
