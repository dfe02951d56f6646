"""A session's Working Context under measurement: layouts that no policy decided, and what a context expects next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mc_runtime import Session
from mc_runtime.context import NO_NODES, Expanded, WorkingContext
from mc_runtime.focus.allocator import layout_entries, pinned_nodes
from mc_runtime.model import Decoder
from mc_runtime.train.losses import nll_rows


def coarsest(session: Session) -> Expanded:
    """The layout that opens what is pinned and nothing else."""
    context = session.context
    pins = pinned_nodes(session.config.block_size, context.counts, session.focus.pinned(context.length))
    return {level: np.asarray(nodes, np.int64) for level, nodes in pins.items()}


def level_one(session: Session) -> Expanded:
    """The layout in which everything that is not pinned stands as gists of level 1."""
    counts, pins = session.context.counts, coarsest(session)
    above = {level: np.arange(counts[level], dtype=np.int64) for level in range(2, len(counts))}
    return {1: pins.get(1, NO_NODES), **above}


def slots_of(context: WorkingContext, expanded: Expanded) -> int:
    """Slots that a layout fills."""
    return len(layout_entries(context.config.block_size, context.counts, expanded)[0])


@torch.inference_mode()
def assembled(context: WorkingContext, expanded: Expanded) -> WorkingContext:
    """A branch in which the layout was built from scratch. Raises BudgetError if it does not fit."""
    branch = context.fork(context.cache.stacked(1))
    branch.assemble(expanded)
    return branch


@torch.inference_mode()
def follow(context: WorkingContext, targets: Sequence[int]) -> Tensor:
    """Final hidden states [T, E] from which a context predicts T true tokens that come next, on a branch of it.

    The newest entry, a token, is run again: what it expects has to come from the context as it is now.
    """
    branch = context.fork(context.cache.widened(context.cache.capacity + len(targets)))
    newest = branch.run(np.array([branch.used - 1])).hidden[0]
    if len(targets) == 1:
        return newest
    return torch.cat((newest, branch.append(targets[:-1]).hidden[0]))


def mean_nll(decoder: Decoder, hidden: Tensor, targets: Sequence[int]) -> float:
    """Nats per target; hidden [T, E] as `follow` gives it."""
    ids = torch.tensor(list(targets), dtype=torch.int64, device=hidden.device)
    return float(nll_rows(hidden, ids, decoder.head).double().mean())
