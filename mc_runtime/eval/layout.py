"""How good a layout is: a long history in few slots, read on as while decoding, and what then is likely to follow.

A history of held-out text is ingested once; each policy gets a copy of the memory. Before every measuring point the
memory reads some true tokens block by block and refocuses after each block, exactly as while decoding; then the NLL of
the next true tokens is taken on a branch that leaves nothing behind. Between points the text is ingested. At the same
points stand, over the same tokens: gists with nothing opened, and plain windows over the newest tokens, read anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray

from mc_runtime import Session
from mc_runtime.config import MemoryConfig, RefreshMode
from mc_runtime.context import WorkingContext
from mc_runtime.errors import InputError
from mc_runtime.focus import FocusPolicy
from mc_runtime.model import Decoder, LoadedModel
from mc_runtime.train.corpus import Corpus
from mc_runtime.tree import Transaction
from mc_runtime.turns import QUERY_TOKENS

from .contexts import assembled, coarsest, follow, level_one, mean_nll, slots_of
from .pasts import draw_windows
from .swaps import Cycle, Snapshot, changes

COARSEST, LEVEL_ONE = "gists, nothing opened", "gists of level 1"
RECENCY, WINDOW = "recency, as many slots", "recent window"


@dataclass(frozen=True)
class LayoutSetting:
    """`history` tokens before the first of `points` measuring points that a history serves, `every` tokens apart; n
    points per text in all. Before each, `cycles` blocks are read with a refocus after each. recent: newest tokens,
    always in full. targets: tokens whose likelihood is measured. Raises InputError for lengths that do not fit.
    """

    history: int = 16384
    budget: int = 2048
    recent: int = 64
    targets: int = 64
    every: int = 1024
    points: int = 4
    cycles: int = 4
    refresh: RefreshMode = "full"
    n: int = 34
    seed: int = 1
    block_size: int = 32

    def __post_init__(self) -> None:
        for name in ("recent", "targets", "points", "cycles", "n"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.every < self.reading:
            least = f"the {self.reading} tokens of {self.cycles} cycles"
            raise InputError(f"every: expected at least {least}, got {self.every}")
        if self.history <= self.reading:
            raise InputError(f"history: expected more than the {self.reading} tokens that are read, got {self.history}")
        self.config()

    @property
    def reading(self) -> int:
        """Tokens read as while decoding, before each point."""
        return self.cycles * self.block_size

    @property
    def slots(self) -> int:
        """That any arm may fill at a point: while decoding, a block's slots stay free for what comes next."""
        return self.budget - self.block_size

    def config(self) -> MemoryConfig:
        return MemoryConfig(
            budget=self.budget, recent_tokens=self.recent, refresh=self.refresh, block_size=self.block_size
        )


@dataclass(frozen=True)
class Point:
    """One measuring point. history: its number; length: tokens of text before the targets. By arm: nll, mean nats per
    target; slots, in use by level of the entries (0: tokens)."""

    history: int
    length: int
    nll: dict[str, float]
    slots: dict[str, dict[int, int]]


@dataclass
class LayoutResult:
    """text: its name. cycles: by policy, the refocus cycles of every history."""

    text: str
    points: list[Point] = field(default_factory=list)
    cycles: dict[str, list[list[Cycle]]] = field(default_factory=dict)


def measure_layouts(
    model: LoadedModel,
    corpus: Corpus,
    policies: Mapping[str, FocusPolicy],
    setting: LayoutSetting,
    result: LayoutResult,
    gistnet: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> None:
    """Append to `result`, point by point; untrained gists without `gistnet`. progress: called after each point.

    Raises InputError for a text that is too short, or more slots than the model has positions; BudgetError for a
    budget that cannot hold the coarsest layout.
    """
    most = model.config.max_positions - setting.targets
    if setting.budget > most:
        raise InputError(f"budget: expected at most {most} slots, so that the targets have positions too")
    histories = -(-setting.n // setting.points)
    past = setting.history + (setting.points - 1) * setting.every
    windows = draw_windows(corpus, histories, past, setting.targets, setting.seed)
    for number, row in enumerate(windows.numpy()):
        points = min(setting.points, setting.n - number * setting.points)
        with TemporaryDirectory() as folder, ExitStack() as stack:
            ids = row[: setting.history - setting.reading]
            sessions = _open_copies(Path(folder), model, ids, policies, setting, gistnet, stack)
            runs = [result.cycles.setdefault(name, []) for name in policies]
            for run in runs:
                run.append([])
            for point in range(points):
                at = setting.history + point * setting.every
                if point and setting.every > setting.reading:
                    for session in sessions.values():
                        session.ingest(row[at - setting.every : at - setting.reading])
                for run, session in zip(runs, sessions.values(), strict=True):
                    run[-1] += read_on(session, row[at - setting.reading : at], filling=point == 0)
                targets = row[at : at + setting.targets].tolist()
                nll, slots = {}, {}
                for name, session in sessions.items():
                    nll[name], slots[name] = arm_of(session.context, targets)
                bounds = plain_arms(next(iter(sessions.values())), targets, setting)
                nll |= {name: value for name, (value, _) in bounds.items()}
                slots |= {name: count for name, (_, count) in bounds.items()}
                result.points.append(Point(number, at, nll, slots))
                progress(1)


def _open_copies(
    folder: Path,
    model: LoadedModel,
    ids: NDArray[np.int64],
    policies: Mapping[str, FocusPolicy],
    setting: LayoutSetting,
    gistnet: Path | None,
    stack: ExitStack,
) -> dict[str, Session]:
    """The history in a memory of its own for each policy: read once, then copied."""
    first = folder / "ingested"
    with Session.open(first, model, gistnet=gistnet, config=setting.config()) as session:
        session.ingest(ids)
    sessions = {}
    for number, (name, policy) in enumerate(policies.items()):
        path = folder / str(number)
        shutil.copytree(first, path)
        opened = Session.open(path, model, gistnet=gistnet, config=setting.config(), policy=policy)
        sessions[name] = stack.enter_context(opened)
    return sessions


@torch.inference_mode()
def read_on(session: Session, ids: NDArray[np.int64], *, filling: bool = False) -> list[Cycle]:
    """Read tokens block by block into the history, with a refocus on the newest text after each block, as while
    decoding. filling: recorded in the cycles."""
    context, focus, size = session.context, session.focus, session.config.block_size
    cycles = []
    for first in range(0, len(ids), size):
        start = Snapshot.of(context)
        focus.make_room(context, size)
        roomy = Snapshot.of(context)
        mass = context.append(ids[first : first + size].tolist(), return_mass=focus.policy.needs_mass).mass
        context.commit(session.builder, _record)
        report = focus.refocus(
            context,
            query=session.model.tokenizer.decode(session.tree.tokens()[-QUERY_TOKENS:].tolist()),
            mass=None if mass is None else mass[:, 0].double().cpu().numpy(),
            reserve=size,
        )
        opened, closed = changes(start, roomy, Snapshot.of(context))
        cycles.append(Cycle(opened, closed, context.used, report.recomputed, filling))
    return cycles


def _record(transaction: Transaction, start: int, stop: int) -> None:
    transaction.add_document(kind="document", title="read on", source=None, start=start, stop=stop, ingest="contextual")


def arm_of(context: WorkingContext, targets: Sequence[int]) -> tuple[float, dict[int, int]]:
    """NLL of the targets after a context, and its slots by level."""
    nll = mean_nll(context.decoder, follow(context, targets), targets)
    return nll, context.entries.per_level()


def plain_arms(
    session: Session, targets: Sequence[int], setting: LayoutSetting
) -> dict[str, tuple[float, dict[int, int]]]:
    """What is no policy's doing: gists alone, and windows over the newest tokens with and without the budget's slots.
    The gists of level 1 are left out where they do not fit."""
    context, decoder = session.context, session.model.decoder
    arms = {COARSEST: arm_of(assembled(context, coarsest(session)), targets)}
    if slots_of(context, level_one(session)) <= setting.slots:
        arms[LEVEL_ONE] = arm_of(assembled(context, level_one(session)), targets)
    tokens, head = session.tree.tokens(), session.focus.head
    for name, slots in ((RECENCY, setting.slots), (WINDOW, head + setting.recent)):
        arms[name] = plain_window(decoder, tokens, head, slots, targets), {0: min(slots, len(tokens))}
    return arms


@torch.inference_mode()
def plain_window(decoder: Decoder, tokens: NDArray[np.integer], head: int, slots: int, targets: Sequence[int]) -> float:
    """NLL of the targets after the first `head` tokens of a history (system prompt and attention sink; StreamingLLM,
    Xiao et al. 2024) and its newest, `slots` in all, read from scratch at neighbouring positions."""
    kept = tokens if len(tokens) <= slots else np.concatenate((tokens[:head], tokens[len(tokens) - slots + head :]))
    ids = torch.tensor([[*kept.tolist(), *targets[:-1]]], dtype=torch.int64, device=decoder.device)
    hidden = decoder(decoder.embed(ids), torch.arange(ids.shape[1], device=decoder.device)[None]).hidden
    return mean_nll(decoder, hidden[0, -len(targets) :], targets)
