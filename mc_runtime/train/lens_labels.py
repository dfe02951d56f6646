"""What LensNet learns to predict: nats that an edit gains or costs over the tokens that follow.

Measured labels run the context once per edit. Gate labels rank all edits of a context with one forward and one
backward: the coarse and the fine form of every leaf stand in the context together, the one that is not shown with
weight g << 1 (a log-weight on its attention logits, `kv_bias`), and the derivative of the NLL by g is what a little of
it changes. Gradients by the log-weights of all entries come from one backward; the gates are sums of them:

    d/dg = (1/g) * sum of gradients of the form that enters - 1/(1-g) * sum of those of the form that leaves

Positions are true ones (span centres), at which both forms have a place of their own.

A gist of gists is opened for what lies deep under it: one step shows other gists, which may say as little. So the gain
of a gist of level 2 is that of its children and of the tokens of one of them, the best, where that is more; the tokens
stand in the context too, gated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_runtime.focus.leaves import Leaves
from mc_runtime.focus.view import Floats
from mc_runtime.timeline import Entries

from .lens_contexts import Scene, Slots, packed_slots, run_behind
from .losses import distillation_loss, nll_rows

GATE = 0.02
# Contexts that are run together when edits are measured.
MEASURE_BATCH = 32


@dataclass
class _Gated:
    """The context of one row with all forms in it. leaf, role [S]: which leaf a slot speaks for (-1: none), and how."""

    levels: list[int]
    index: list[int]
    weight: list[float]
    leaf: list[int]
    role: list[int]

    def add(self, level: int, index: int, weight: float, leaf: int, role: int) -> None:
        self.levels.append(level)
        self.index.append(index)
        self.weight.append(weight)
        self.leaf.append(leaf)
        self.role.append(role)


OWN, FINER, COARSER, FINEST = 0, 1, 2, 3


def _gated_context(scene: Scene, layout: Entries, leaves: Leaves, far_leaves: int, gate: float) -> _Gated:
    size = scene.block_size
    out = _Gated([], [], [], [], [])
    whole = _whole_groups(leaves, far_leaves, scene.far)
    leaf_of = np.full(len(layout), -1)
    for i in range(far_leaves):
        leaf_of[leaves.rank[i] : leaves.rank[i] + leaves.slots[i]] = i
    gates = [int(leaves.levels[i] > 0) + int(whole[i] >= 0) for i in range(far_leaves)]
    for rank in range(len(layout)):
        leaf = int(leaf_of[rank])
        weight = 1.0 - gate * gates[leaf] if leaf >= 0 else 1.0
        out.add(int(layout.levels[rank]), int(layout.index[rank]), weight, leaf, OWN)
    for i in range(far_leaves):
        level, index = int(leaves.levels[i]), int(leaves.index[i])
        if level > 0:
            # The first token is in the context in any case.
            children = range(max(index * size, int(level == 1)), (index + 1) * size)
            for child in children:
                out.add(level - 1, child, gate, i, FINER)
        if level == 2:
            for token in range(max(index * size**2, 1), (index + 1) * size**2):
                out.add(0, token, gate, i, FINEST)
        if whole[i] == i:
            parent_level, parent = (int(x[i]) for x in leaves.parents())
            out.add(parent_level, parent, gate, i, COARSER)
    return out


def _whole_groups(leaves: Leaves, far_leaves: int, far: int) -> NDArray[np.int64]:
    """[n]: the first leaf of the sibling set that a leaf collapses with, -1 where some siblings are no leaves now or
    the parent would hold tokens that are not remembered yet. The first block and the recent ones stay."""
    level, index = leaves.parents()
    group = np.full(far_leaves, -1)
    i = 0
    while i < far_leaves:
        j = i
        while j < far_leaves and (level[j], index[j]) == (level[i], index[i]):
            j += 1
        span = leaves.block_size ** int(level[i])
        complete = (int(index[i]) + 1) * span <= far and level[i] <= 2
        if complete and int(leaves.spans[i:j].sum()) == span and (leaves.levels[i] > 0 or leaves.starts[i] > 0):
            group[i:j] = i
        i = j
    return group


def gate_labels(scene: Scene, leaves: Sequence[Leaves], *, gate: float = GATE) -> list[Floats]:
    """Of each row [n, 2]: nats per target token that expanding a leaf gains and that collapsing it costs, by gates.

    A gist of level 2 gains what its children do, or these and the best one's tokens. NaN where an edit is not possible
    or not measured (a collapse of which some siblings are open). The cost of a sibling set is split over its leaves:
    their sum is that of the set.
    """
    far_leaves = [int((one.starts < scene.far).sum()) for one in leaves]
    contexts = [
        _gated_context(scene, layout, one, n, gate)
        for layout, one, n in zip(scene.entries, leaves, far_leaves, strict=True)
    ]
    width, batch = max(len(c.levels) for c in contexts), len(contexts)
    index = torch.zeros(batch, width, dtype=torch.int64)
    position = torch.full((batch, width), -1, dtype=torch.int64)
    bias = torch.zeros(batch, width)
    for row, c in enumerate(contexts):
        levels, at = np.array(c.levels), np.array(c.index)
        spans = scene.block_size**levels
        index[row, : len(levels)] = torch.from_numpy(scene.source(levels, at))
        position[row, : len(levels)] = torch.from_numpy(at * spans + (spans - 1) // 2)
        bias[row, : len(levels)] = torch.tensor([math.log(w) for w in c.weight])
    device = scene.ids.device
    slots = Slots(index.to(device), position.to(device), torch.full((batch,), scene.far, device=device))
    bias = bias.to(device).requires_grad_()
    hidden = run_behind(scene, range(batch), slots, scene.recent + scene.targets, kv_bias=bias).hidden
    known = scene.known_targets(range(batch))
    predicted = hidden[:, scene.recent - 1 : -1][known]
    loss, _ = distillation_loss(predicted, None, scene.ids[:, -scene.targets :][known], scene.decoder.head, 0.0)
    loss.backward()
    assert bias.grad is not None
    # The loss is a mean over the targets of all rows; the labels are of each row's own mean.
    share = known.sum() / known.sum(dim=1, keepdim=True)
    gradient = (bias.grad * share).double().cpu().numpy()
    return [
        _labels_of(gradient[row], c, leaves[row], far_leaves[row], scene.far, gate) for row, c in enumerate(contexts)
    ]


def _labels_of(gradient: Floats, context: _Gated, leaves: Leaves, far_leaves: int, far: int, gate: float) -> Floats:
    leaf, role = np.array(context.leaf), np.array(context.role)
    gradient = gradient[: len(leaf)]

    def total(which: int) -> Floats:
        chosen = (role == which) & (leaf >= 0)
        sums: Floats = np.bincount(leaf[chosen], weights=gradient[chosen], minlength=far_leaves).astype(np.float64)
        return sums

    own, finer, coarser = total(OWN), total(FINER), total(COARSER)
    deeper = {i: _best_child(gradient, context, i, leaves.block_size) for i in (leaves.levels == 2).nonzero()[0]}
    labels = np.full((len(leaves), 2), np.nan)
    whole = _whole_groups(leaves, far_leaves, far)
    for i in range(far_leaves):
        gates = int(leaves.levels[i] > 0) + int(whole[i] >= 0)
        leaves_now = own[i] / (1.0 - gate * gates)
        if leaves.levels[i] > 0:
            labels[i, 0] = leaves_now - finer[i] / gate + (deeper[i] if leaves.levels[i] == 2 else 0.0) / gate
        if whole[i] >= 0:
            siblings = int((whole == whole[i]).sum())
            labels[i, 1] = coarser[whole[i]] / gate / siblings - leaves_now
    return labels


def _best_child(gradient: Floats, context: _Gated, leaf: int, size: int) -> float:
    """What a gate lets in more, at least 0, if one child of a gist of level 2 is tokens instead of a gist."""
    mine, role, index = np.array(context.leaf) == leaf, np.array(context.role), np.array(context.index)
    children, first = mine & (role == FINER), int(index[mine & (role == FINER)].min())
    tokens = mine & (role == FINEST)
    saved = np.bincount(index[children] - first, weights=gradient[children], minlength=size)
    saved -= np.bincount(index[tokens] // size - first, weights=gradient[tokens], minlength=size)
    return max(0.0, float(saved.max()))


@torch.no_grad()
def layout_nll(scene: Scene, rows: Sequence[int], layouts: Sequence[Entries]) -> Floats:
    """[n] mean NLL of the targets behind each layout, packed positions."""
    out: list[float] = []
    for i in range(0, len(layouts), MEASURE_BATCH):
        part, which = layouts[i : i + MEASURE_BATCH], rows[i : i + MEASURE_BATCH]
        hidden = run_behind(scene, which, packed_slots(scene, part), scene.recent + scene.targets).hidden
        targets: Tensor = scene.ids[torch.tensor(list(which)), -scene.targets :]
        nll = nll_rows(hidden[:, scene.recent - 1 : -1].flatten(0, 1), targets.flatten(), scene.decoder.head)
        known = scene.known_targets(which)
        out += ((nll.view(targets.shape) * known).sum(1) / known.sum(1)).double().tolist()
    return np.array(out)


@torch.no_grad()
def recent_nll(scene: Scene, row: int, layouts: Sequence[Entries]) -> Floats:
    """[n, recent - 1] NLL of one row's recent tokens, the first aside, behind each layout, packed positions."""
    out: list[Floats] = []
    targets = scene.ids[row, scene.far + 1 : scene.far + scene.recent]
    for i in range(0, len(layouts), MEASURE_BATCH):
        part = layouts[i : i + MEASURE_BATCH]
        hidden = run_behind(scene, [row] * len(part), packed_slots(scene, part), scene.recent).hidden[:, :-1]
        nll = nll_rows(hidden.flatten(0, 1), targets.repeat(len(part)), scene.decoder.head)
        out.append(nll.view(len(part), -1).double().cpu().numpy())
    return np.concatenate(out)


def expanded_layout(layout: Entries, rank: int) -> Entries:
    """The layout with the gist at `rank` in place of which its children stand (the first token never twice)."""
    size, level, index = layout.block_size, int(layout.levels[rank]), int(layout.index[rank])
    children = np.arange(index * size, (index + 1) * size)
    if level == 1 and rank and layout.levels[rank - 1] == 0:
        children = children[children > layout.index[rank - 1]]
    levels = np.concatenate(
        (layout.levels[:rank], np.full(len(children), level - 1, np.int8), layout.levels[rank + 1 :])
    )
    return Entries(levels, np.concatenate((layout.index[:rank], children, layout.index[rank + 1 :])), size)


def collapsed_layout(layout: Entries, leaves: Leaves, leaf: int) -> Entries:
    """The layout with the entries of a leaf's whole sibling set replaced by their parent."""
    levels_up, index_up = leaves.parents()
    level, index = int(levels_up[leaf]), int(index_up[leaf])
    members = ((levels_up == level) & (index_up == index)).nonzero()[0]
    first, last = int(leaves.rank[members[0]]), int(leaves.rank[members[-1]] + leaves.slots[members[-1]])
    levels = np.concatenate((layout.levels[:first], np.array([level], np.int8), layout.levels[last:]))
    return Entries(
        levels, np.concatenate((layout.index[:first], np.array([index]), layout.index[last:])), layout.block_size
    )


def measured_labels(scene: Scene, row: int, leaves: Leaves) -> Floats:
    """[n, 2] as `gate_labels`, by running the context with each edit alone. One forward per edit."""
    far_leaves = int((leaves.starts < scene.far).sum())
    layout, whole = scene.entries[row], _whole_groups(leaves, far_leaves, scene.far)
    edits: list[tuple[int, int, Entries]] = []
    for i in range(far_leaves):
        if leaves.levels[i] > 0:
            edits.append((i, 0, expanded_layout(layout, int(leaves.rank[i]))))
        if whole[i] == i:
            edits.append((i, 1, collapsed_layout(layout, leaves, i)))
    nll = layout_nll(scene, [row] * (len(edits) + 1), [layout, *(edited for _, _, edited in edits)])
    labels = np.full((len(leaves), 2), np.nan)
    for (i, column, _), value in zip(edits, nll[1:], strict=True):
        if column == 0:
            labels[i, 0] = nll[0] - value
        else:
            members = whole == i
            labels[:far_leaves][members, 1] = (value - nll[0]) / members.sum()
    return labels
