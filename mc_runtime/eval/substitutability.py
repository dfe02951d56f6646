"""How well a few slots stand for the text they came from: NLL of the next true tokens, by arm.

Arms: full context (ceiling), sink and recent window alone (floor), and every rival with the same number of slots. All
see the same recent tokens and are asked for the same targets. Windows depend on the text and the setting alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_runtime.model.decoder import Decoder
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.losses import nll_rows

from .pasts import Past, draw_windows, hidden_after, read_past
from .rivals import Rival
from .statistics import Estimate, bootstrap_of_means, recovery_of_means

FULL, WINDOW = "full context", "recent window"
Kind = Literal["bound", "rival", "ours"]


@dataclass(frozen=True)
class Setting:
    """far tokens in far / ratio slots for each of `ratios`, `recent` tokens that all arms see, NLL over the next
    `targets`; n windows per text. batch_tokens: of the windows that are read at once, about."""

    far: int = 256
    ratios: tuple[int, ...] = (32,)
    recent: int = 32
    targets: int = 64
    n: int = 100
    packed: bool = True
    seed: int = 1
    batch_tokens: int = 4096


@dataclass(frozen=True, eq=False)
class Arm:
    """anew: see `Rival`. nll: [n] mean nats per target token of each window."""

    name: str
    kind: Kind
    anew: bool
    slots: int
    nll: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """All arms of one text at one ratio; the first two are the bounds, FULL and WINDOW."""

    text: str
    ratio: int
    arms: tuple[Arm, ...]

    def __getitem__(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def recovery(self, arm: Arm) -> Estimate:
        """Share of the benefit of the full context over the window that the arm keeps."""
        return bootstrap_of_means(recovery_of_means, self[WINDOW].nll, self[FULL].nll, arm.nll)

    def delta(self, arm: Arm) -> Estimate:
        """NLL above the full context's, nats per token."""
        return bootstrap_of_means(np.subtract, arm.nll, self[FULL].nll)

    def best_rival(self, *, anew: bool) -> Arm | None:
        """The rival of lowest mean NLL on these very windows, which flatters it, among those that choose once or among
        those that choose anew."""
        rivals = (arm for arm in self.arms if arm.kind == "rival" and arm.anew == anew)
        return min(rivals, key=lambda arm: float(arm.nll.mean()), default=None)

    @property
    def best_rivals(self) -> list[Arm]:
        """The best of either sort, as far as there are any."""
        found = (self.best_rival(anew=False), self.best_rival(anew=True))
        return [arm for arm in found if arm is not None]

    def ahead(self, ours: Arm, rival: Arm) -> tuple[Estimate, Estimate]:
        """Paired differences ours - rival: of NLL (negative: ours is better), and of recovery."""
        nll = bootstrap_of_means(np.subtract, ours.nll, rival.nll)
        return nll, bootstrap_of_means(
            lambda w, f, a, b: recovery_of_means(w, f, a) - recovery_of_means(w, f, b),
            *(self[WINDOW].nll, self[FULL].nll, ours.nll, rival.nll),
        )


@torch.no_grad()
def substitutability(
    decoder: Decoder,
    corpus: Corpus,
    lineup: Mapping[int, Sequence[Rival]],
    setting: Setting,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Comparison]:
    """Every rival of `lineup` (by ratio) on `setting.n` windows of held-out text; one comparison per ratio.

    The full context is read once for all of them.
    """
    windows = draw_windows(corpus, setting.n, setting.far + setting.recent, setting.targets, setting.seed)
    batch = max(1, setting.batch_tokens // windows.shape[1])
    bounds: dict[str, list[float]] = {FULL: [], WINDOW: []}
    rows: dict[int, list[list[float]]] = {ratio: [[] for _ in lineup[ratio]] for ratio in setting.ratios}
    for ids in windows.split(batch):
        past = read_past(decoder, ids.to(decoder.device), setting.far, setting.recent)
        bounds[FULL] += target_nll(past, past.hidden)
        bounds[WINDOW] += target_nll(past, hidden_after(past, None, packed=setting.packed))
        for ratio in setting.ratios:
            for rival, values in zip(lineup[ratio], rows[ratio], strict=True):
                values += target_nll(past, rival.follow(past, setting.far // ratio, setting.packed))
        progress(len(ids))
    comparisons = []
    for ratio in setting.ratios:
        slots = setting.far // ratio
        arms = [
            Arm(FULL, "bound", False, setting.far, _column(bounds[FULL])),
            Arm(WINDOW, "bound", False, 0, _column(bounds[WINDOW])),
        ]
        for rival, values in zip(lineup[ratio], rows[ratio], strict=True):
            arms.append(Arm(rival.name, "ours" if rival.ours else "rival", rival.anew, slots, _column(values)))
        comparisons.append(Comparison(corpus.name, ratio, tuple(arms)))
    return comparisons


def target_nll(past: Past, hidden: Tensor) -> list[float]:
    """hidden: [B, recent + targets, E] -> mean NLL of each window's targets, nats per token."""
    targets = past.ids[:, past.far + past.recent :]
    rows = nll_rows(hidden[:, past.recent - 1 : -1].flatten(0, 1), targets.flatten(), past.decoder.head)
    return rows.view(targets.shape).mean(1).double().tolist()


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    """As a report holds it: 1e-6 nats are far below what sampling leaves open."""
    return np.round(np.array(values), 6)
