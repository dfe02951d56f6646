"""What it costs to leave keys and values as they are when the context before them has changed.

A Working Context over a held-out text is filled with opened blocks and then edited, one block opened or closed at a
time. Each refresh mode makes the same edits on a branch of its own. After some of them its predictions of the true
tokens that follow are held against those of the same layout assembled from scratch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from mc_runtime import Session
from mc_runtime.config import RefreshMode
from mc_runtime.context import NO_NODES, Expanded, WorkingContext
from mc_runtime.errors import BudgetError
from mc_runtime.model import LoadedModel
from mc_runtime.train.corpus import Corpus

from .contexts import assembled, coarsest, follow, level_one, slots_of
from .pasts import draw_windows

# No conversation is read here: `text` would be `full` again.
MODES: tuple[RefreshMode, ...] = ("none", "tail", "top", "full")
ANEW = "assembled anew"


@dataclass(frozen=True)
class StalenessSetting:
    """history tokens in `budget` slots, the newest `recent` in full, the next `targets` predicted after so many
    `edits`; n contexts per text. block_size, tail, share: as in `MemoryConfig`."""

    history: int = 2000
    budget: int = 512
    recent: int = 64
    targets: int = 64
    edits: tuple[int, ...] = (1, 8, 32)
    n: int = 30
    seed: int = 1
    block_size: int = 32
    tail: int = 64
    share: float = 0.15


@dataclass(frozen=True)
class Reading:
    """One mode's predictions in one context after some edits.

    kl: KL(assembled anew || mode) in nats per token. right: share of the true tokens that are its first choice; agrees:
    share of its first choices that are those of the layout assembled anew. recomputed: entries run per edit so far,
    those that the edit brought in included; for the layout assembled anew, entries run in all.
    """

    context: int
    mode: str
    edits: int
    kl: float
    right: float
    agrees: float
    recomputed: float


def kl_rows(reference: Tensor, other: Tensor) -> Tensor:
    """KL(reference || other) of each row of logits [T, vocab], [T] float64 nats."""
    p, q = (x.double().log_softmax(-1) for x in (reference, other))
    return (p.exp() * (p - q)).sum(-1)


def full_layout(rng: np.random.Generator, session: Session) -> Expanded:
    """All of the history as gists of level 1, and as many drawn blocks opened as the budget holds while a block's slots
    stay free, as they do when decoding; or one fewer, so that a first edit may open as well as close. Raises
    BudgetError if there is room for none."""
    context, size = session.context, session.config.block_size
    layout = level_one(session)
    room = (session.config.budget - size - slots_of(context, layout)) // (size - 1)
    free = editable(session)
    if room < 1 or not len(free):
        raise BudgetError(
            f"budget: {session.config.budget} slots hold the gists of {context.length} tokens, but no opened block "
            "beside the recent text; give a larger budget or a shorter history"
        )
    drawn = rng.choice(free, min(room - int(rng.integers(2)), len(free)), replace=False)
    return layout | {1: np.union1d(layout.get(1, NO_NODES), drawn)}


def editable(session: Session) -> np.ndarray:
    """Blocks that may be opened and closed: all that are not pinned."""
    return np.setdiff1d(np.arange(session.tree.count(1)), coarsest(session).get(1, NO_NODES))


def edit_walk(rng: np.random.Generator, session: Session, start: Expanded, count: int) -> list[Expanded]:
    """Layouts that lead away from `start` one by one block each, opened or closed, as the budget allows."""
    size, blocks = session.config.block_size, editable(session)
    free = (session.config.budget - size - slots_of(session.context, start)) // (size - 1)
    opened = set(start[1].tolist())
    layouts: list[Expanded] = []
    while len(layouts) < count:
        block = int(rng.choice(blocks))
        if block not in opened and not free:
            continue
        free += 1 if block in opened else -1
        opened ^= {block}
        layouts.append(start | {1: np.array(sorted(opened), np.int64)})
    return layouts


@torch.inference_mode()
def staleness(
    model: LoadedModel,
    corpus: Corpus,
    setting: StalenessSetting,
    gistnet: Path | None = None,
    readings: list[Reading] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Reading]:
    """Readings of `setting.n` contexts, appended to `readings` context by context; untrained gists without `gistnet`.

    Raises InputError for a text that is too short and BudgetError for a budget that is too small.
    """
    found = [] if readings is None else readings
    windows = draw_windows(corpus, setting.n, setting.history, setting.targets, setting.seed)
    for number, row in enumerate(windows.numpy()):
        with TemporaryDirectory() as folder:
            session = Session.open(
                Path(folder) / "memory", model, gistnet=gistnet, budget=setting.budget, recent_tokens=setting.recent,
                block_size=setting.block_size, refresh_tail=setting.tail, refresh_share=setting.share,
            )  # fmt: skip
            with session:
                session.ingest(row[: setting.history])
                found += _readings(session, number, row[setting.history :].tolist(), setting)
        progress(1)
    return found


def _readings(session: Session, number: int, targets: Sequence[int], setting: StalenessSetting) -> list[Reading]:
    context, decoder = session.context, session.model.decoder
    rng = np.random.default_rng((setting.seed, number))
    start = full_layout(rng, session)
    context.assemble(start)
    branches = {mode: context.fork(context.cache.stacked(1)) for mode in MODES}
    ran = dict.fromkeys(branches, 0)
    known = torch.tensor(targets, device=decoder.device)
    found = []

    def logits(branch: WorkingContext) -> Tensor:
        return decoder.logits(follow(branch, targets))

    for edits, layout in enumerate(edit_walk(rng, session, start, max(setting.edits)), start=1):
        for mode, branch in branches.items():
            ran[mode] += branch.relayout(layout, mode=mode).recomputed
        if edits not in setting.edits:
            continue
        fresh = assembled(context, layout)
        truth = logits(fresh)
        first = truth.argmax(-1)
        tokens = int((fresh.entries.levels == 0).sum())
        found.append(Reading(number, ANEW, edits, 0.0, _share(first == known), 1.0, float(tokens)))
        for mode, branch in branches.items():
            got = logits(branch)
            choice = got.argmax(-1)
            kl = float(kl_rows(truth, got).mean())
            found.append(
                Reading(number, mode, edits, kl, _share(choice == known), _share(choice == first), ran[mode] / edits)
            )
    return found


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
