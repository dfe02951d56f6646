"""How well a few slots stand for the text they came from: NLL of the next true tokens, by arm.

Arms: full context (ceiling), sink and recent window alone (floor), and every rival with the same number of slots. All
see the same recent tokens and are asked for the same targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mc_runtime.model.decoder import Decoder
from mc_runtime.train.corpus import Corpus
from mc_runtime.train.losses import nll_rows

from .pasts import Past, hidden_after, read_past
from .rivals import Rival
from .statistics import Estimate, bootstrap, recovery

FULL, WINDOW = "full context", "recent window"


@dataclass(frozen=True)
class Setting:
    """far tokens in `slots` slots, `recent` tokens that all arms see, NLL over the next `targets`; n windows."""

    far: int = 256
    slots: int = 8
    recent: int = 32
    targets: int = 64
    n: int = 100
    packed: bool = True
    seed: int = 1
    batch: int = 10


@dataclass(frozen=True)
class Arm:
    """nll: [n] mean nats per target token of each window."""

    name: str
    nll: NDArray[np.float64]
    window: NDArray[np.float64]
    full: NDArray[np.float64]

    @property
    def recovery(self) -> Estimate:
        return bootstrap(recovery, self.window, self.full, self.nll)

    @property
    def delta(self) -> Estimate:
        """NLL above the full context's."""
        return bootstrap(lambda a, b: float((a - b).mean()), self.nll, self.full)


@torch.no_grad()
def substitutability(
    decoder: Decoder,
    corpus: Corpus,
    rivals: Sequence[Rival],
    setting: Setting,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Arm]:
    """One arm each for the full context, the window and every rival, on `setting.n` windows of held-out text."""
    rng = random.Random(setting.seed)
    length = setting.far + setting.recent + setting.targets
    rows: dict[str, list[float]] = {FULL: [], WINDOW: [], **{r.name: [] for r in rivals}}
    for done in range(0, setting.n, setting.batch):
        count = min(setting.batch, setting.n - done)
        ids = torch.from_numpy(np.stack([corpus.sample(rng, length) for _ in range(count)])).to(decoder.device)
        past = read_past(decoder, ids, setting.far, setting.recent)
        rows[FULL] += _nll(past, past.hidden[:, setting.far :], setting)
        rows[WINDOW] += _nll(past, hidden_after(past, None, packed=setting.packed), setting)
        for rival in rivals:
            kept = rival.keep(past, setting.slots)
            rows[rival.name] += _nll(past, hidden_after(past, kept, packed=setting.packed), setting)
        progress(count)
    nll = {name: np.array(values) for name, values in rows.items()}
    return [Arm(name, values, nll[WINDOW], nll[FULL]) for name, values in nll.items()]


def _nll(past: Past, hidden: torch.Tensor, setting: Setting) -> list[float]:
    """hidden: [B, recent + targets, E] -> mean NLL of each window's targets."""
    t = setting.targets
    targets = past.ids[:, -t:]
    rows = nll_rows(hidden[:, -t - 1 : -1].flatten(0, 1), targets.flatten(), past.decoder.head)
    return rows.view(targets.shape).mean(1).double().tolist()
