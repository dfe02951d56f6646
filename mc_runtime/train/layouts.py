"""How a training sample sees its past: which entries of a sequence stand in the context, as tokens or as gists.

A layout is drawn, not computed: a share of the blocks is gisted (often all, as in a long memory; else a random share),
the first token or the whole first block stays as the sink, and some runs of K gists become one of level 2. Where a
block has several gists, they stand at successive ranks in the order of the text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """One context entry: a token of the sequence (level 0), or the gist number `index` of a level, G of which belong to
    each of the level's blocks."""

    level: int
    index: int


@dataclass(frozen=True)
class LayoutOptions:
    """whole: share of samples whose blocks are all gisted. sink_block: share that keep the first block at full detail
    (the others keep the first token). level2: share of the complete runs of K gists that become one entry.
    true_positions: share of samples at global instead of packed positions."""

    whole: float = 0.6
    sink_block: float = 0.5
    level2: float = 0.0
    true_positions: float = 0.15


def draw_layout(
    rng: random.Random, blocks: int, size: int, options: LayoutOptions, gists: Sequence[int] = (1, 1)
) -> list[Entry]:
    """Entries for a past of `blocks` blocks of `size` tokens, in timeline order. gists: per block, by level."""

    def gists_of(level: int, index: int) -> list[Entry]:
        count = gists[level - 1]
        return [Entry(level, index * count + g) for g in range(count)]

    share = 1.0 if rng.random() < options.whole else rng.random()
    entries: list[Entry] = []
    if rng.random() < options.sink_block:
        entries += [Entry(0, i) for i in range(size)]
        first = 1
    else:
        entries.append(Entry(0, 0))
        first = 0
    block = first
    while block < blocks:
        if block % size == 0 and block + size <= blocks and rng.random() < options.level2:
            entries += gists_of(2, block // size)
            block += size
            continue
        if rng.random() < share:
            entries += gists_of(1, block)
        else:
            entries += [Entry(0, i) for i in range(block * size, (block + 1) * size)]
        block += 1
    return entries


@dataclass(frozen=True)
class Gathered:
    """Layouts of several samples as index tensors. index: [n, S] into tokens, then level-1 gists, then level-2 gists of
    the sample's sequence; position: [n, S], -1 where a shorter sample is padded; start: [n], the position of the first
    token that is run."""

    index: Tensor
    position: Tensor
    start: Tensor


def split_entries(where: Gathered, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Index and position, [n, S] each and in timeline order, of the chosen [n, S] entries and of the others; padded
    with positions of -1."""
    parts = []
    for mine in (chosen, ~chosen):
        mine = mine & (where.position >= 0)
        order = (~mine).to(torch.int8).argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
        index = torch.where(mine, where.index, 0).gather(1, order)
        parts.append((index, torch.where(mine, where.position, -1).gather(1, order)))
    return parts[0], parts[1]


def gather_layouts(
    layouts: Sequence[Sequence[Entry]],
    cuts: Sequence[int],
    tokens: int,
    size: int,
    packed: Sequence[bool],
    gists: Sequence[int] = (1, 1),
) -> Gathered:
    """cuts: where each sample's past ends; tokens: length of a sequence; packed: rank positions (else span centres);
    gists: per block, by level. A gist's span is its share of its block. Entries of the level above those of `gists`
    stand behind them in the index, at packed positions only."""
    longest = max(len(layout) for layout in layouts)
    index = torch.zeros(len(layouts), longest, dtype=torch.int64)
    position = torch.full((len(layouts), longest), -1, dtype=torch.int64)
    start = torch.zeros(len(layouts), dtype=torch.int64)
    base = [0, tokens]
    for level, count in enumerate(gists, start=1):
        base.append(base[-1] + tokens // size**level * count)
    span = (1, *(size**level // count for level, count in enumerate(gists, start=1)))
    for row, (layout, cut, is_packed) in enumerate(zip(layouts, cuts, packed, strict=True)):
        index[row, : len(layout)] = torch.tensor([base[e.level] + e.index for e in layout])
        if is_packed:
            position[row, : len(layout)] = torch.arange(len(layout))
            start[row] = len(layout)
        else:
            centres = [e.index * span[e.level] + (span[e.level] - 1) // 2 for e in layout]
            position[row, : len(layout)] = torch.tensor(centres)
            start[row] = cut
    return Gathered(index, position, start)
