"""Gate labels against derivatives taken the slow way, and measured labels against contexts written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mc_kernels import GistPoolWeights
from mc_runtime.model import LoadedModel
from mc_runtime.model.stores import ConcatStore
from mc_runtime.timeline import Entries
from mc_runtime.train.lens_contexts import Scene, attention_mass, draw_opened, layout_of, read_scene
from mc_runtime.train.lens_labels import collapsed_layout, expanded_layout, gate_labels, layout_nll, measured_labels
from mc_runtime.train.pooled_maker import pool_levels

K, FAR, RECENT, TARGETS = 8, 64, 16, 8


def pools(model: LoadedModel) -> list[GistPoolWeights]:
    c = model.config
    return [GistPoolWeights.zeros(c.n_layers, c.n_kv_heads, 1, K, c.head_dim)] * 2


def scene_of(model: LoadedModel, *layouts: Entries, seed: int = 0) -> Scene:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (len(layouts), FAR + RECENT + TARGETS), generator=generator)
    return read_scene(model.decoder, pools(model), ids, layouts, FAR, RECENT)


def opened(*blocks: int) -> np.ndarray:
    result = np.zeros(FAR // K, np.bool_)
    result[list(blocks)] = True
    return result


def slow_nll(model: LoadedModel, scene: Scene, row: int, layout: Entries) -> float:
    """One context, entry by entry, through a store of its own."""
    ids, decoder = scene.ids[row : row + 1], model.decoder
    store = ConcatStore()
    decoder(decoder.embed(ids[:, :FAR]), torch.arange(FAR)[None], store)
    levels = [(store.keys, store.values), *pool_levels(store.keys, store.values, pools(model), K)]
    entries = [(int(a), int(b)) for a, b in zip(layout.levels, layout.index, strict=True)]
    k = torch.stack([levels[level][0][:, :, :, i] for level, i in entries], dim=3)
    v = torch.stack([levels[level][1][:, :, :, i] for level, i in entries], dim=3)
    n, follow = len(entries), ids[:, FAR:]
    context = ConcatStore(k, v, torch.arange(n)[None])
    hidden = decoder(decoder.embed(follow), torch.arange(n, n + follow.shape[1])[None], context).hidden
    logits = decoder.logits(hidden[0, RECENT - 1 : -1]).float()
    return float(F.cross_entropy(logits, ids[0, -TARGETS:]))


def test_far_tokens_that_all_rows_share_are_read_once(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, layouts = torch.Generator().manual_seed(1), (layout_of(opened(2), K), layout_of(opened(5), K))
    ids = torch.randint(0, 200, (2, FAR + RECENT + TARGETS), generator=generator)
    ids[1, :FAR] = ids[0, :FAR]
    read: list[int] = []
    embed = model.decoder.embed
    monkeypatch.setattr(model.decoder, "embed", lambda x: read.append(x.numel()) or embed(x))
    shared = read_scene(model.decoder, pools(model), ids, layouts, FAR, RECENT)
    assert read == [FAR]
    for row in range(2):
        alone = read_scene(model.decoder, pools(model), ids[row : row + 1], layouts[row : row + 1], FAR, RECENT)
        torch.testing.assert_close(shared.source_k[:, row], alone.source_k[:, 0])
    labels = gate_labels(shared, [shared.leaves(row) for row in range(2)])
    assert all(np.isfinite(x).any() for x in labels)


@torch.no_grad()
def test_layouts_are_what_they_say(model: LoadedModel) -> None:
    layout = layout_of(opened(2, 3), K)
    assert layout.levels.tolist() == [0] + [1] * 2 + [0] * 16 + [1] * 4
    assert layout.index.tolist() == [0, 0, 1, *range(16, 32), 4, 5, 6, 7]
    assert layout_of(opened(), K, groups=[0]).levels.tolist() == [0, 2]
    assert layout_of(opened(0), K).index.tolist() == [*range(8), *range(1, 8)]


@torch.no_grad()
def test_nll_of_layouts_is_that_of_single_contexts(model: LoadedModel) -> None:
    layouts = [layout_of(opened(), K), layout_of(opened(1, 5), K), layout_of(opened(), K, groups=[0])]
    scene = scene_of(model, *layouts)
    values = layout_nll(scene, range(3), layouts)
    for row, layout in enumerate(layouts):
        assert values[row] == pytest.approx(slow_nll(model, scene, row, layout), abs=2e-5)


@torch.no_grad()
def test_measured_labels_are_differences_of_single_contexts(model: LoadedModel) -> None:
    layout = layout_of(opened(3), K)
    scene = scene_of(model, layout)
    leaves = scene.leaves(0)
    labels = measured_labels(scene, 0, leaves)
    base = slow_nll(model, scene, 0, layout)
    place = {(int(a), int(b)): i for i, (a, b) in enumerate(zip(leaves.levels, leaves.index, strict=True))}
    assert labels[place[1, 5], 0] == pytest.approx(
        base - slow_nll(model, scene, 0, layout_of(opened(3, 5), K)), abs=4e-5
    )
    assert labels[place[0, 3], 1] == pytest.approx(slow_nll(model, scene, 0, layout_of(opened(), K)) - base, abs=4e-5)
    assert np.isnan(labels[place[0, 3], 0]), "a block of tokens cannot be expanded"
    recent = [i for i in range(len(leaves)) if leaves.starts[i] >= FAR]
    assert recent
    assert np.isnan(labels[recent]).all(), "what is recent stays"
    # The siblings of level 1 are not all gists: their parent has no measured cost.
    assert np.isnan(labels[place[1, 5], 1])


@torch.no_grad()
def test_cost_of_a_sibling_set_is_split(model: LoadedModel) -> None:
    layout = layout_of(opened(), K)
    scene = scene_of(model, layout)
    leaves = scene.leaves(0)
    labels = measured_labels(scene, 0, leaves)
    siblings = leaves.levels == 1
    cost = slow_nll(model, scene, 0, layout_of(opened(), K, groups=[0])) - slow_nll(model, scene, 0, layout)
    assert labels[siblings, 1].sum() == pytest.approx(cost, abs=4e-5)
    assert np.ptp(labels[siblings, 1]) == 0


def test_edited_layouts(model: LoadedModel) -> None:
    layout = layout_of(opened(3), K)
    first = expanded_layout(layout, 1)
    assert first.index.tolist()[:9] == [*range(8), 1], "the sink does not stand twice"
    scene = scene_of(model, layout)
    leaves = scene.leaves(0)
    block = int(((leaves.levels == 0) & (leaves.index == 3)).argmax())
    closed = collapsed_layout(layout, leaves, block)
    assert closed.levels.tolist() == [0] + [1] * 8
    assert closed.index.tolist() == [0, *range(8)]


@pytest.mark.parametrize("groups", [[], [0]])
def test_gate_labels_are_derivatives_by_the_gates(model: LoadedModel, groups: list[int]) -> None:
    """Against central differences of the NLL in each gate alone, all forms in the context."""
    blocks = opened() if groups else opened(0, 3)
    layout = layout_of(blocks, K, groups)
    scene = scene_of(model, layout, seed=1)
    leaves, gate = scene.leaves(0), 0.05
    labels = gate_labels(scene, [leaves], gate=gate)[0]
    legal = np.isfinite(labels)
    assert legal.any()
    for leaf, column in zip(*legal.nonzero(), strict=True):
        if column == 1 and leaves.levels[leaf] > 0:
            continue  # split over siblings: their sum is below
        step = 1e-3
        slow = -_slow_gated(scene, leaf, column, gate, step) if column == 0 else _slow_gated(scene, leaf, 1, gate, step)
        if leaves.levels[leaf] == 2:
            slow += max(0.0, max(-_slow_gated(scene, leaf, 0, gate, step, child) for child in range(K)))
        assert labels[leaf, column] == pytest.approx(slow, rel=0.02, abs=2e-3)


def _slow_gated(scene: Scene, leaf: int, column: int, gate: float, step: float, child: int | None = None) -> float:
    """d NLL / d gate of one leaf's edit, by a difference; with a child: of showing its tokens instead of its gist."""

    def nll(g: float) -> float:
        leaves, layout = scene.leaves(0), scene.entries[0]
        far = int((leaves.starts < FAR).sum())
        entries: list[tuple[int, int, float]] = []
        whole = _whole(leaves, far)
        for i in range(far):
            gates = [gate] * (int(leaves.levels[i] > 0) + int(whole[i]))
            mine = [g if (i == leaf and kind == column) else gate for kind in _kinds(leaves, i, whole)]
            assert len(gates) == len(mine)
            rank, slots = int(leaves.rank[i]), int(leaves.slots[i])
            for r in range(rank, rank + slots):
                entries.append((int(layout.levels[r]), int(layout.index[r]), 1 - sum(mine)))
            level, index = int(leaves.levels[i]), int(leaves.index[i])
            for kind, value in zip(_kinds(leaves, i, whole), mine, strict=True):
                if kind == 0:
                    first = index * K + (level == 1 and index == 0)
                    entries += [(level - 1, one, value) for one in range(first, (index + 1) * K)]
                    if level == 2:
                        entries += [(0, token, gate) for token in range(max(index * K**2, 1), (index + 1) * K**2)]
                    if i == leaf and child is not None:
                        mark = index * K + child
                        entries = [
                            (a, b, 2 * gate - g if (a, b) == (1, mark) else g if a == 0 and b // K == mark else w)
                            for a, b, w in entries
                        ]
                elif level == 0:
                    entries.append((1, index, value))
        covered = {int(r) for i in range(far) for r in range(leaves.rank[i], leaves.rank[i] + leaves.slots[i])}
        entries += [(int(layout.levels[r]), int(layout.index[r]), 1.0) for r in range(len(layout)) if r not in covered]
        place = scene.source(np.array([e[0] for e in entries]), np.array([e[1] for e in entries]))
        pos = torch.tensor([[e[1] * K ** e[0] + (K ** e[0] - 1) // 2 for e in entries]])
        bias = torch.tensor([[math.log(e[2]) for e in entries]])
        store = ConcatStore(scene.source_k[:, :1, :, place], scene.source_v[:, :1, :, place], pos, kv_bias=bias)
        follow = scene.ids[:1, FAR:]
        with torch.no_grad():
            at = torch.arange(FAR, FAR + follow.shape[1])[None]
            hidden = scene.decoder(scene.decoder.embed(follow), at, store).hidden
            logits = scene.decoder.logits(hidden[0, RECENT - 1 : -1]).double()
        return float(F.cross_entropy(logits, scene.ids[0, -TARGETS:]))

    return (nll(gate + step) - nll(gate - step)) / (2 * step)


def _whole(leaves, far: int) -> list[bool]:
    """Blocks of tokens may close, but for the first; level 1 has no parent in these layouts."""
    return [bool(leaves.levels[i] == 0 and leaves.starts[i] > 0) for i in range(far)]


def _kinds(leaves, i: int, whole: list[bool]) -> list[int]:
    return ([0] if leaves.levels[i] > 0 else []) + ([1] if whole[i] else [])


def test_mass_sums_to_queries_heads(model: LoadedModel) -> None:
    layouts = [layout_of(opened(2), K), layout_of(opened(), K)]
    scene = scene_of(model, *layouts)
    for mass, layout in zip(attention_mass(scene), layouts, strict=True):
        assert mass.shape == (model.config.n_layers, len(layout) + RECENT)
        np.testing.assert_allclose(mass.sum(axis=1), RECENT * model.config.n_heads, rtol=1e-5)


def test_drawn_layouts_vary() -> None:
    import random

    rng = random.Random(0)
    counts = [int(draw_opened(rng, 32).sum()) for _ in range(200)]
    assert counts.count(0) > 40
    assert max(counts) > 8
    assert max(counts) <= 32
