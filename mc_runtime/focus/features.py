"""What LensNet sees of a Working Context: one row per leaf, and the queries of `lens_queries`.

A leaf is a gist, or a full block of K tokens whose level-1 node is stored, which it is scored by. Tokens of other
blocks are the ragged tail: they can be neither expanded nor collapsed and get no row. All columns are of order one.

Mass: per layer, entries' shares of all attention paid (so neither the number of queries nor that of heads matters),
over the share of one of N equal entries; a leaf has the mean of its entries. Means of such ratios enter as logs. An
entry that the model has not attended to, of a layout that is only thought of, has no mass, and its leaf none.

Levels above the second are seen as the second: their gists are made alike, and training does not reach them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .leaves import Leaves, find_leaves, parents_of
from .lens_queries import newest_queries
from .retrieval import HALF_SCORE
from .view import Floats, FocusView, Ints

if TYPE_CHECKING:
    from mc_runtime.layout import Layout
    from mc_runtime.timeline import Entries

MASS_GROUPS = 6  # of five layers each in a model of 30
# The columns. A net is trained for exactly these: a change of meaning or scale needs a change of name.
FEATURES: tuple[str, ...] = (
    "level_to_2_over_2",  # 0: a block of tokens
    "is_tokens",
    "log_span_to_level_2_over_8",  # tokens covered
    "log_distance_over_8",  # 1 + tokens between its end and the end of the history
    "log_rank_distance_over_8",  # 1 + entries between its end and the newest
    "place",  # its start as a share of the history
    "is_first",  # holds the attention sink
    "asked",  # a question is to be answered: what matters is worth far more than to text that goes on
    "retrieval",  # BM25 of its best block, over that of the tree's best
    "retrieval_sharp",  # the fourth power of that: nearly the best, or not
    "retrieval_sure",  # s / (s + HALF_SCORE) of the same score s
    "has_retrieval",  # 0: nothing was asked, or nothing matches it
    "has_mass",  # 0: the mass is not known, and all columns of it are 0
    *(f"log_mass_{group}_over_2" for group in range(1, MASS_GROUPS + 1)),  # by groups of layers
    "log_mass_top_over_2",  # in the layer where it is largest
    "log_mass_near_over_2",  # of the leaves before and after, all layers
    "mass_peak",  # block of tokens: log_K of its best token over its mean one
)
FEATURES_HASH = hashlib.sha256("\n".join(FEATURES).encode()).hexdigest()[:16]

MOST_LEVEL = 2  # as which the levels above are seen
LEAST_MASS = 1e-3  # of an even share; less counts as this


@dataclass(frozen=True)
class LensInputs:
    """N leaves in timeline order, as `lens_score` takes them.

    levels, index: [N] int64. Leaf i is gist (levels[i], index[i]), or at level 0 the tokens of block index[i].
    rank: [N] int64, the place of its first entry in the layout.
    entries: [N, E] stored summaries (of the level-1 node for a block of tokens), in the model's dtype.
    features: [N, F] fp32, F = len(FEATURES). queries: [Q, E], 1 <= Q <= 16, in entries' dtype.
    legal: [N, 2] bool: can it be expanded; can its siblings and it be collapsed, now or once they are all leaves.
    """

    levels: Ints
    index: Ints
    rank: Ints
    block_size: int
    entries: Tensor
    features: Tensor
    queries: Tensor
    legal: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """entries, features, queries, legal."""
        return self.entries, self.features, self.queries, self.legal

    def parents(self) -> tuple[Ints, Ints]:
        """[N], [N]: level and index of the node that each leaf collapses into."""
        return parents_of(self.levels, self.index, self.block_size)


def lens_inputs(
    view: FocusView, mu: Tensor, *, pinned: Sequence[tuple[int, int]] = (), layout: Entries | None = None
) -> LensInputs:
    """Rows for the leaves of `view.context`, or of another layout of the same history, and queries.

    mu: [E] mean of the model's embeddings: pooled tokens are centred on it, as summaries are. pinned: token ranges that
    stay at full detail besides the first document (the system prompt) and the newest tokens. O(slots), apart from BM25
    over the tree. Raises ValueError if the mass is not that of the context's entries.
    """
    context, entries = view.context, view.context.entries
    if view.mass is not None and (view.mass.ndim != 2 or not len(view.mass) or view.mass.shape[1] != len(entries)):
        raise ValueError(f"mass: expected [L, {len(entries)}] with L >= 1, got {list(view.mass.shape)}")
    shown = entries if layout is None else layout
    mass = view.mass if layout is None or view.mass is None else _carried(view.mass, entries, layout)
    leaves = find_leaves(shown, context.tree.count(1), context.length)
    scores = view.retrieval.scores(view.query)[: view.recent_start // context.config.block_size]
    features = feature_rows(leaves, mass, scores if view.query.strip() else None, view.asked)
    device = context.decoder.device
    with torch.no_grad():
        rows = _summaries(context, np.maximum(leaves.levels, 1), leaves.index)
        queries = newest_queries(view, mu).to(rows)
    legal = torch.from_numpy(_legal(leaves, context, pinned)).to(device)
    size = context.config.block_size
    known = torch.from_numpy(features).to(device)
    return LensInputs(leaves.levels, leaves.index, leaves.rank, size, rows, known, queries, legal)


def _carried(mass: Floats, old: Entries, new: Entries) -> Floats:
    """[L, len(new)]: the mass of the entries that both layouts have; NaN for the others."""
    _, a, b = np.intersect1d(old.keys, new.keys, assume_unique=True, return_indices=True)
    result = np.full((len(mass), len(new)), np.nan)
    result[:, b] = mass[:, a]
    return result


def feature_rows(leaves: Leaves, mass: Floats | None, block_scores: Floats | None, asked: bool) -> NDArray[np.float32]:
    """[n, F], columns as `FEATURES` names them.

    mass: [L, entries] attention that the newest tokens paid to each entry of the layout, by rank, or None; NaN in all
        layers for an entry of which it is not known.
    block_scores: BM25 of the history's blocks, from the first to the last that is not recent text, or None.
    asked: a user's turn is under way.
    """
    columns = {name: np.zeros(len(leaves)) for name in FEATURES}
    if len(leaves):
        _place_columns(columns, leaves)
        columns["asked"] = np.full(len(leaves), float(asked))
        if block_scores is not None:
            _retrieval_columns(columns, leaves, block_scores)
        if mass is not None:
            _mass_columns(columns, leaves, mass)
    return np.stack([columns[name] for name in FEATURES], axis=1).astype(np.float32)


def _place_columns(columns: dict[str, Floats], leaves: Leaves) -> None:
    stops = leaves.starts + leaves.spans
    levels = np.minimum(leaves.levels, MOST_LEVEL)
    columns["level_to_2_over_2"] = levels / 2
    columns["is_tokens"] = (leaves.levels == 0).astype(np.float64)
    columns["log_span_to_level_2_over_8"] = np.log(leaves.block_size) * np.maximum(levels, 1) / 8
    columns["log_distance_over_8"] = np.log1p(np.maximum(leaves.length - stops, 0)) / 8
    columns["log_rank_distance_over_8"] = np.log1p(leaves.entries - leaves.rank - leaves.slots) / 8
    columns["place"] = leaves.starts / max(leaves.length, 1)
    columns["is_first"] = (leaves.starts == 0).astype(np.float64)


def _retrieval_columns(columns: dict[str, Floats], leaves: Leaves, scores: Floats) -> None:
    size = leaves.block_size
    top = float(scores.max()) if len(scores) else 0.0
    if top <= 0:
        return
    first, stop = leaves.starts // size, (leaves.starts + leaves.spans) // size
    padded = np.zeros(max(len(scores), int(stop[-1])) + 1)
    padded[: len(scores)] = scores
    best = np.maximum.reduceat(padded, np.stack((first, stop), axis=1).ravel())[::2]
    columns["retrieval"] = best / top
    columns["retrieval_sharp"] = (best / top) ** 4
    columns["retrieval_sure"] = best / (best + HALF_SCORE)
    columns["has_retrieval"] = np.ones(len(best))


def _log_mass(density: Floats) -> Floats:
    return np.log(np.maximum(density, LEAST_MASS)) / 2


def _mass_columns(columns: dict[str, Floats], leaves: Leaves, mass: Floats) -> None:
    n_layers = len(mass)
    known = ~np.isnan(mass.sum(axis=0))
    mass = np.where(known, mass, 0.0)
    even = mass.sum(axis=1, keepdims=True) / max(int(known.sum()), 1)
    density = mass / np.where(even > 0, even, 1.0)  # [L, N]
    edges = np.concatenate((np.zeros((n_layers, 1)), np.cumsum(density, axis=1)), axis=1)
    of_leaf = (edges[:, leaves.rank + leaves.slots] - edges[:, leaves.rank]) / leaves.slots  # [L, n]
    seen = known[leaves.rank]
    columns["has_mass"] = seen.astype(np.float64)
    for group in range(MASS_GROUPS):
        # Equal parts; where the layers do not divide evenly, neighbouring parts share a layer.
        layers = slice(group * n_layers // MASS_GROUPS, -(-(group + 1) * n_layers // MASS_GROUPS))
        columns[f"log_mass_{group + 1}_over_2"] = np.where(seen, _log_mass(of_leaf[layers].mean(axis=0)), 0.0)
    columns["log_mass_top_over_2"] = np.where(seen, _log_mass(of_leaf.max(axis=0)), 0.0)
    mean = of_leaf.mean(axis=0)
    # The leaf itself stands in for a neighbour that it lacks, at an end, or whose mass is not known.
    before = np.where(np.roll(seen, 1) & (np.arange(len(mean)) > 0), np.roll(mean, 1), mean)
    after = np.where(np.roll(seen, -1) & (np.arange(len(mean)) < len(mean) - 1), np.roll(mean, -1), mean)
    columns["log_mass_near_over_2"] = np.where(seen, _log_mass((before + after) / 2), 0.0)
    blocks = ((leaves.levels == 0) & seen).nonzero()[0]
    if len(blocks):
        tokens = density.mean(axis=0)[leaves.rank[blocks, None] + np.arange(leaves.block_size)]  # [blocks, K]
        ratio = tokens.max(axis=1) / np.maximum(tokens.mean(axis=1), LEAST_MASS)
        columns["mass_peak"][blocks] = np.log(np.maximum(ratio, 1.0)) / np.log(leaves.block_size)


def _legal(leaves: Leaves, context: Layout, pinned: Sequence[tuple[int, int]]) -> np.ndarray:
    """[n, 2] bool. A collapse is legal into a stored parent of which no part is pinned."""
    tree, size = context.tree, context.config.block_size
    level, index = leaves.parents()
    counts = np.asarray([tree.count(one) for one in range(int(level.max(initial=0)) + 1)])
    collapse = index < counts[level]
    head = tree.document_at(0) if tree.length else None
    recent = (context.length - context.config.recent_tokens, context.length)
    start, stop = index * np.int64(size) ** level, (index + 1) * np.int64(size) ** level
    for first, last in ((0, head.stop if head is not None else 1), recent, *pinned):
        collapse &= (stop <= first) | (start >= last) | (first >= last)
    return np.stack((leaves.levels > 0, collapse), axis=1)


def _summaries(context: Layout, levels: Ints, index: Ints) -> Tensor:
    """[n, E] stored summaries of nodes in timeline order, levels >= 1: copied run by run of neighbours."""
    like = context.decoder.embedding
    rows = torch.empty(len(levels), like.shape[1], dtype=like.dtype)
    stored = {int(level): context.tree.summaries(int(level)) for level in np.unique(levels)}
    breaks = ((np.diff(levels) != 0) | (np.diff(index) != 1)).nonzero()[0] + 1
    edges = [0, *breaks.tolist(), len(levels)] if len(levels) else []
    for start, stop in itertools.pairwise(edges):
        first = int(index[start])
        rows[start:stop] = stored[int(levels[start])][first : first + stop - start]
    return rows.to(like.device)
