"""Inputs of `refocus_`: random Working Contexts over random trees, with scores, a store and past cycles."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gist_pool.weights import GistPoolWeights
from .state import LAST_KEY, GistStore, RefocusLists, RefocusRule, RefocusState, node_key

Nodes = list[tuple[int, int]]


def tree_counts(tokens: int, k: int, missing: tuple[int, ...] = ()) -> list[int]:
    """Tokens, then nodes of each level of a full tree; `missing`: how many of each level are not stored yet."""
    counts = [tokens]
    for level in range(1, 64):
        less = missing[level - 1] if level <= len(missing) else 0
        stored = max(counts[-1] // k - less, 0)
        if not stored:
            break
        counts.append(stored)
    return counts


def random_layout(rng: np.random.Generator, k: int, counts: list[int], share: float) -> Nodes:
    """A tiling of the history in timeline order: each node stands for itself or, with probability `share`, its children
    do; the newest of each level always."""
    out: Nodes = []

    def show(level: int, index: int) -> None:
        if level == 0 or rng.random() >= share:
            out.append((level, index))
        else:
            for child in range(index * k, index * k + k):
                show(level - 1, child)

    for level in range(len(counts) - 1, -1, -1):
        above = counts[level + 1] if level + 1 < len(counts) else 0
        for index in range(above * k, counts[level]):
            show(level, index)
    return out


@dataclass(frozen=True)
class Case:
    """layers, kv_heads, head_dim: of the cache. tokens, k: of the tree, 2 <= k; missing: see `tree_counts`. share:
    of the nodes that are opened. at_hand: share of the gists whose children are in the store. room: slots of the budget
    beyond the entries, below 0: it is short. scale: nats; grid: scores are multiples of it, 0: any."""

    name: str
    layers: int = 1
    kv_heads: int = 1
    head_dim: int = 4
    tokens: int = 90
    k: int = 3
    missing: tuple[int, ...] = ()
    share: float = 0.5
    at_hand: float = 0.8
    room: int = 0
    spare_slots: int = 6
    scale: float = 0.3
    grid: float = 0.0
    pinned: tuple[tuple[int, int], ...] = ((0, 1),)
    rule: dict[str, Any] = field(default_factory=dict)

    def make(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
        """The arguments of `refocus_`, all of them but `backend`. k and v are views of one cache [L, 2, Hkv, S, D]."""
        rng = np.random.default_rng(seed)
        context = self.context(rng, device)
        keys, rows = self.store_index(rng, context["state"], device)
        shape = (self.layers, self.kv_heads, int(rows.max()) + self.k, self.head_dim)
        k, v = (self._random(rng, *shape).to(device, dtype) for _ in range(2))
        return {
            **context,
            **self._cache(rng, context["state"].capacity, dtype, device),
            "store": GistStore(k, v, keys, rows),
        }

    def context(self, rng: np.random.Generator, device: str = "cpu") -> dict[str, Any]:
        """The arguments without keys and values: state, scores, counts, pinned, rule, lists."""
        counts = tree_counts(self.tokens, self.k, self.missing)
        nodes = random_layout(rng, self.k, counts, self.share)
        n = len(nodes)
        budget = max(n + self.room, 0)
        capacity = max(n, budget) + self.spare_slots
        levels, index = [level for level, _ in nodes], [index for _, index in nodes]
        slots = torch.from_numpy(rng.permutation(n))
        state = RefocusState.of(levels, index, capacity, slots=slots, gist_bias=0.5, device=device)
        cycle = int(rng.integers(0, 6))
        state.numbers[1] = cycle
        past = rng.integers(-cycle, cycle + 1, n) * (rng.random(n) < 0.5)
        state.born[:n] = torch.from_numpy(past).to(state.born)
        return {
            "state": state,
            "scores": self.scores(rng, capacity, device),
            "counts": torch.tensor([*counts, 0], device=device),
            "pinned": torch.tensor(self.pinned, dtype=torch.int64, device=device).view(-1, 2),
            "rule": RefocusRule(self.k, budget, gist_bias=0.5, **self.rule),
            "lists": RefocusLists.allocate(capacity, max(n // 4, 1), device),
        }

    def scores(self, rng: np.random.Generator, capacity: int, device: str = "cpu") -> Tensor:
        """Random ones, [capacity, 2] fp32."""
        scores = torch.from_numpy(rng.normal(0, self.scale, (capacity, 2))).float()
        scores[:, 1] += self.scale
        if self.grid:
            scores = (scores / self.grid).round() * self.grid
        return scores.to(device)

    def _random(self, rng: np.random.Generator, *shape: int) -> Tensor:
        return torch.from_numpy(rng.normal(size=shape))

    def _cache(self, rng: np.random.Generator, capacity: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
        shape = (self.layers, 2, self.kv_heads, capacity, self.head_dim)
        cache = self._random(rng, *shape).to(device, dtype)
        two, heads = 2 * self.head_dim, (self.layers, self.kv_heads)
        weights = [
            GistPoolWeights(*(
                (self._random(rng, *heads, *size) * 0.3).to(device, dtype)
                for size in ((1, two), (1, self.k), (two, two), (two,))
            ))
            for _ in range(2)
        ]  # fmt: skip
        return {"k": cache[:, 0], "v": cache[:, 1], "weights": weights}

    def store_index(self, rng: np.random.Generator, state: RefocusState, device: str) -> tuple[Tensor, Tensor]:
        """Keys and rows; also of nodes that are not shown, in rows of no order, with unused ends."""
        shown = zip(state.levels.tolist(), state.index.tolist(), strict=True)
        gists = [node for node in shown if node[0] > 0 and rng.random() < self.at_hand]
        keys = sorted({node_key(*node, self.k) for node in [*gists, (1, 10_000), (3, 1)]})
        rows = rng.permutation(len(keys)) * self.k
        ends = [LAST_KEY] * 3
        return (
            torch.tensor([*keys, *ends], device=device),
            torch.tensor([*rows, 0, 0, 0], dtype=torch.int32, device=device),
        )


SMALL = [
    Case("small/room", room=8),
    Case("small/full"),
    Case("small/over", room=-7, share=0.7),
    Case("small/far-over", room=-60, share=0.6),
    Case("small/ties", grid=0.25, room=2, rule={"min_gain": 0.0, "hysteresis": 0.25}),
    Case("small/not-stored-yet", missing=(3, 1), room=5, share=0.7, rule={"cooldown": 0}),
    Case("small/binary", k=2, tokens=61, share=0.7, room=3, rule={"max_edits": 3}),
    Case("small/few-edits", k=4, tokens=300, share=0.6, room=5, rule={"max_edits": 4, "cooldown": 1}),
    Case("small/few-edits-over", k=4, tokens=300, share=0.8, room=-20, rule={"max_edits": 9, "cooldown": 0}),
    Case("small/pinned", share=0.8, room=-9, pinned=((0, 9), (40, 41), (80, 90), (7, 7))),
    Case("small/nothing-at-hand", at_hand=0.0, room=20),
]
EMPTY = [
    Case("empty/no-tokens", tokens=0, pinned=()),
    Case("empty/no-slots", tokens=0, pinned=(), spare_slots=0),
    Case("empty/no-nodes", tokens=2),
]
# A context of some 8,000 entries, most of them tokens; the cache is Llama-3-8B's but for the number of layers.
LARGE = Case(
    "large/8k", 2, 8, 128, tokens=36_000, k=32, missing=(0, 0, 1), share=0.46, room=-200, rule={"max_edits": 24}
)
