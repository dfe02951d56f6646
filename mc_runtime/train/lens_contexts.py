"""Contexts for LensNet: text of which most stands as gists, read as the runtime reads it.

A `Scene` is a batch of sequences in which a far part stands as a layout of gists and opened blocks, the recent tokens
behind it in full, and the tokens that follow are the truth that a layout is judged by.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_kernels import GistPoolWeights
from mc_runtime.focus.leaves import Leaves, find_leaves
from mc_runtime.focus.view import Floats
from mc_runtime.model.decoder import Decoder, DecoderOutput
from mc_runtime.model.stores import ConcatStore
from mc_runtime.timeline import Entries

from .pooled_maker import pool_levels

# Share of layouts that open nothing; of complete runs of gists that become one of level 2.
ALL_GISTS, LEVEL_2 = 0.4, 0.5
# Largest share of the blocks that a layout opens, and the longest passage of neighbours.
MOST_OPENED, LONGEST_PASSAGE = 0.4, 4


@dataclass(frozen=True)
class Scene:
    """B sequences, of which `far` tokens are remembered, `recent` ones are in full, and the rest is to be predicted.

    ids: [B, far + recent + targets]. entries: the layout of the far part of each sequence. source_k, source_v:
    [L, B, Hkv, far + far // K + far // K**2, D]: tokens, then the gists of level 1, then of level 2; keys unrotated.
    known: true targets of each sequence (the rest is padding), or None: all. gist_bias: log-weight of gists.
    """

    decoder: Decoder
    ids: Tensor
    far: int
    recent: int
    block_size: int
    entries: tuple[Entries, ...]
    source_k: Tensor
    source_v: Tensor
    known: tuple[int, ...] | None = None
    gist_bias: float = 0.0

    def known_targets(self, rows: Sequence[int]) -> Tensor:
        """[n, targets] bool."""
        every = [self.targets] * len(self.entries) if self.known is None else list(self.known)
        counts = torch.tensor([every[row] for row in rows], device=self.ids.device)
        return torch.arange(self.targets, device=self.ids.device) < counts[:, None]

    @property
    def targets(self) -> int:
        return self.ids.shape[1] - self.far - self.recent

    def source(self, levels: np.ndarray, index: np.ndarray) -> np.ndarray:
        """[n] places of entries in `source_k`."""
        size = self.block_size
        first = np.array([0, self.far, self.far + self.far // size])
        return first[levels] + index

    def leaves(self, row: int) -> Leaves:
        """Those of the far part and of the recent tokens, whose blocks are leaves too."""
        entries = self.entries[row].with_tokens(self.recent)
        length = self.far + self.recent
        return find_leaves(entries, length // self.block_size, length)


def draw_opened(rng: random.Random, blocks: int) -> NDArray[np.bool_]:
    """[blocks]: which of them a layout shows in full, as training sees it: none, or some passages of neighbours."""
    opened = np.zeros(blocks, np.bool_)
    if rng.random() < ALL_GISTS:
        return opened
    left = rng.randint(1, max(1, int(MOST_OPENED * blocks)))
    while left > 0:
        length = min(left, rng.randint(1, LONGEST_PASSAGE))
        start = rng.randrange(blocks)
        opened[start : start + length] = True
        left -= length
    return opened


def draw_groups(rng: random.Random, opened: NDArray[np.bool_], size: int) -> list[int]:
    """Gists of level 2 that a layout shows, among those of which no block is open."""
    groups = range(len(opened) // size)
    return [g for g in groups if not opened[g * size : (g + 1) * size].any() and rng.random() < LEVEL_2]


def layout_of(opened: NDArray[np.bool_], size: int, groups: Sequence[int] = ()) -> Entries:
    """The first token, as the sink; then opened blocks as tokens, `groups` as gists of level 2, the rest of level 1."""
    levels: list[int] = [] if opened[0] else [0]
    index: list[int] = [] if opened[0] else [0]
    block = 0
    while block < len(opened):
        if block % size == 0 and block // size in groups:
            levels.append(2)
            index.append(block // size)
            block += size
            continue
        if opened[block]:
            levels += [0] * size
            index += range(block * size, (block + 1) * size)
        else:
            levels.append(1)
            index.append(block)
        block += 1
    return Entries(np.array(levels, np.int8), np.array(index, np.int64), size)


@torch.no_grad()
def read_scene(
    decoder: Decoder, pools: Sequence[GistPoolWeights], ids: Tensor, entries: Sequence[Entries], far: int, recent: int
) -> Scene:
    """Run the far tokens in full context and pool their gists. ids: [B, N]; pools: of levels 1 and 2. Far tokens that
    all rows share are read once, and `source_k` and `source_v` are expanded views."""
    read = ids[:, :far]
    if (read == read[:1]).all():
        read = read[:1]
    store = ConcatStore()
    positions = torch.arange(far, device=ids.device).expand(read.shape)
    decoder(decoder.embed(read), positions, store)
    scene = make_scene(decoder, pools, ids, entries, store.keys, store.values, recent)
    shape = (-1, len(ids), -1, -1, -1)
    return replace(scene, source_k=scene.source_k.expand(shape), source_v=scene.source_v.expand(shape))


@torch.no_grad()
def make_scene(
    decoder: Decoder,
    pools: Sequence[GistPoolWeights],
    ids: Tensor,
    entries: Sequence[Entries],
    k: Tensor,
    v: Tensor,
    recent: int,
) -> Scene:
    """A scene of far tokens that have been read. k, v: [L, B, Hkv, far, D], keys unrotated."""
    size = pools[0].b.shape[-1]
    means = GistPoolWeights(*(torch.zeros_like(x) for x in pools[-1].tensors()))  # as `GistNet.weights_of`
    levels = pool_levels(k, v, [*pools, means][:2], size)
    source_k = torch.cat((k, *(x for x, _ in levels)), dim=3)
    source_v = torch.cat((v, *(x for _, x in levels)), dim=3)
    return Scene(decoder, ids, k.shape[3], recent, size, tuple(entries), source_k, source_v)


@dataclass(frozen=True)
class Slots:
    """One context per row: places in the source [n, S], positions [n, S] (-1: none) and where the text goes on [n]."""

    index: Tensor
    position: Tensor
    start: Tensor


def packed_slots(scene: Scene, layouts: Sequence[Entries]) -> Slots:
    """Entries at their ranks, as in a Working Context."""
    longest = max(len(layout) for layout in layouts)
    index = torch.zeros(len(layouts), longest, dtype=torch.int64)
    position = torch.full((len(layouts), longest), -1, dtype=torch.int64)
    for row, layout in enumerate(layouts):
        index[row, : len(layout)] = torch.from_numpy(scene.source(layout.levels, layout.index))
        position[row, : len(layout)] = torch.arange(len(layout))
    start = torch.tensor([len(layout) for layout in layouts])
    device = scene.ids.device
    return Slots(index.to(device), position.to(device), start.to(device))


def run_behind(
    scene: Scene,
    rows: Sequence[int],
    slots: Slots,
    tokens: int,
    *,
    kv_bias: Tensor | None = None,
    return_mass: bool = False,
) -> DecoderOutput:
    """Run the `tokens` tokens after the far part behind contexts of their own. rows: [n] sequences; kv_bias: [n, S]."""
    device = scene.ids.device
    row = torch.tensor(list(rows), device=device)

    def context(source: Tensor) -> Tensor:
        return source.permute(1, 3, 0, 2, 4)[row[:, None], slots.index].permute(2, 0, 3, 1, 4)

    if scene.gist_bias:
        gists = (slots.index >= scene.far).float() * scene.gist_bias
        kv_bias = gists if kv_bias is None else kv_bias + gists
    store = ConcatStore(context(scene.source_k), context(scene.source_v), slots.position, kv_bias=kv_bias)
    follow = scene.ids[row, scene.far : scene.far + tokens]
    positions = slots.start[:, None] + torch.arange(tokens, device=device)
    return scene.decoder(scene.decoder.embed(follow), positions, store, return_mass=return_mass)


@torch.no_grad()
def attention_mass(scene: Scene) -> list[Floats]:
    """Of each row [L, entries]: what the recent tokens pay to each entry of the layout and to each other."""
    slots = packed_slots(scene, scene.entries)
    output = run_behind(scene, range(len(scene.entries)), slots, scene.recent, return_mass=True)
    assert output.mass is not None
    mass = output.mass.double().cpu().numpy()
    width = slots.index.shape[1]
    return [
        np.concatenate((mass[:, row, : len(layout)], mass[:, row, width:]), axis=1)
        for row, layout in enumerate(scene.entries)
    ]
