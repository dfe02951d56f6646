"""`refocus_`, the op: what becomes of the cache, what is refused, compilation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_kernels import GistPoolWeights, GistStore, RefocusLists, RefocusRule, RefocusState, gist_pool, refocus_
from mc_kernels.refocus.cases import EMPTY, SMALL, Case, random_layout, tree_counts
from mc_kernels.refocus.state import LAST_KEY, node_key

ENOUGH = {"min_gain": 0.1, "hysteresis": 0.0, "cooldown": 0}


def context(nodes: list[tuple[int, int]], capacity: int, counts: list[int], budget: int, **rule: Any) -> dict[str, Any]:
    """A context with K = 2, one layer and head, D = 1. Keys and values are the entries' levels and indices."""
    state = RefocusState.of([level for level, _ in nodes], [index for _, index in nodes], capacity)
    k, v = torch.full((1, 1, capacity, 1), -7.0), torch.full((1, 1, capacity, 1), -7.0)
    k[0, 0, : len(nodes), 0] = torch.tensor([float(level) for level, _ in nodes])
    v[0, 0, : len(nodes), 0] = torch.tensor([float(index) for _, index in nodes])
    gists = [(level, index) for level in range(1, len(counts)) for index in range(counts[level])]
    keys = sorted((node_key(*node, 2), node) for node in gists)
    children = [(level - 1, 2 * index + child) for _, (level, index) in keys for child in (0, 1)]
    store = [torch.tensor([float(child[i]) for child in children]).view(1, 1, -1, 1) for i in (0, 1)]
    return {
        "k": k, "v": v, "state": state, "scores": torch.zeros(capacity, 2),
        "store": GistStore(
            *store, torch.tensor([key for key, _ in keys], dtype=torch.int64),
            torch.arange(len(keys), dtype=torch.int32) * 2,
        ),
        "counts": torch.tensor(counts), "pinned": torch.tensor([[0, 1]]),
        "weights": [GistPoolWeights.zeros(1, 1, 1, 2, 1)], "rule": RefocusRule(2, budget, **(ENOUGH | rule)),
    }  # fmt: skip


def shown(state: RefocusState) -> list[tuple[int, int]]:
    n = state.read().length
    return list(zip(state.levels[:n].tolist(), state.index[:n].tolist(), strict=True))


def test_a_gist_opens_and_a_block_closes_for_it() -> None:
    nodes = [(0, 0), (0, 1), (1, 1), (0, 4), (0, 5), (1, 3)]
    args = context(nodes, 6, [8, 4, 0], budget=6)
    args["scores"][2, 0], args["scores"][5, 0], args["scores"][3, 1] = 0.05, 0.5, 0.2
    lists = refocus_(**args, backend="ref")
    state = args["state"]
    assert shown(state) == [(0, 0), (0, 1), (1, 1), (1, 2), (0, 6), (0, 7)]
    assert state.read() == (6, 1, 1, 1, 0, 0, 3, 0)
    assert lists.edits[:2].tolist() == [[3, 2, 1], [5, 1, 2]]
    assert lists.inserted[:3].tolist() == [[3, -1], [4, 6], [5, 7]]
    assert lists.children[:2].tolist() == [3, 4]
    assert state.born[:6].tolist() == [0, 0, 0, -1, 1, 1]
    assert args["v"].flatten().tolist() == [0, 1, 1, 4.5, 6, 7]  # untrained weights: the mean of 4 and 5


def test_over_the_budget_the_cheapest_closes() -> None:
    nodes = [(0, i) for i in range(8)]
    args = context(nodes, 8, [8, 4, 0], budget=6)
    args["scores"][:, 1] = torch.tensor([0.1, 0, 0.9, 0, 0.3, 0, 0.4, 0])  # the first block is pinned
    args["state"].slots[:8] = torch.tensor([7, 0, 1, 2, 3, 4, 5, 6])
    args["scores"] = args["scores"].roll(-1, 0)
    refocus_(**args, backend="ref")
    state = args["state"]
    assert shown(state) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 2), (1, 3)]
    assert state.pos.tolist()[6:] == [-1, -1]
    assert sorted(state.slots[:6].tolist()) == list(range(6))
    assert state.pos[state.slots[:6]].tolist() == list(range(6))


def test_it_rests_then_changes_again() -> None:
    args = context([(1, 0), (1, 1)], 4, [4, 2, 0], budget=4, cooldown=2)
    args["pinned"] = args["pinned"][:0]
    args["scores"][:, 0] = 1.0
    sizes = []
    for _ in range(5):
        refocus_(**args, backend="ref")
        args["rule"] = RefocusRule(2, 2, **(ENOUGH | {"cooldown": 2}))
        sizes.append(args["state"].read().length)
    assert sizes == [4, 4, 4, 2, 2]
    assert args["state"].read().over == 0


def test_what_is_not_in_the_store_is_wanted() -> None:
    args = context([(1, 0), (1, 1), (0, 4)], 6, [5, 2], budget=6)
    args["store"] = GistStore(
        args["store"].k, args["store"].v, torch.tensor([node_key(1, 1, 2), LAST_KEY]),
        torch.tensor([2, 0], dtype=torch.int32),
    )  # fmt: skip
    args["scores"][:2, 0] = 1.0
    lists = refocus_(**args, backend="ref")
    assert shown(args["state"]) == [(1, 0), (0, 2), (0, 3), (0, 4)]
    assert args["state"].read().wanted == 1
    assert lists.wanted[0] == node_key(1, 0, 2)


def test_gists_are_those_of_gist_pool_by_level() -> None:
    args = Case("levels", 2, 2, 8, k=3, tokens=81, share=1.0, room=-80, spare_slots=0, pinned=()).make(torch.float32)
    args["state"].born.zero_()
    for level in (1, 2):
        before = {name: args[name].clone() for name in "kv"}
        lists = refocus_(**args, backend="ref")
        numbers = args["state"].read()
        children = lists.children[: 3 * numbers.closed].long().view(-1, 3)
        args["rule"] = RefocusRule(3, args["rule"].budget, cooldown=0)
        want = gist_pool(*(before[name][:, :, children] for name in "kv"), args["weights"][level - 1], backend="ref")
        at = lists.inserted[: numbers.inserted, 0].long()
        assert numbers.opened == 0
        for name, gist in zip("kv", want, strict=True):
            assert torch.equal(args[name][:, :, at], gist[..., 0, :])


def test_random_layouts_tile_the_history() -> None:
    for seed in range(20):
        counts = tree_counts(100, 3, (2, 1))
        nodes = random_layout(np.random.default_rng(seed), 3, counts, 0.6)
        stop = 0
        for level, index in nodes:
            assert index * 3**level == stop
            stop += 3**level
        assert stop == 100


@pytest.mark.parametrize("case", EMPTY, ids=lambda c: c.name)
def test_empty(case: Case) -> None:
    args = case.make(torch.float32)
    before = args["k"].clone(), args["state"].clone()
    refocus_(**args, backend="ref")
    assert torch.equal(args["k"], before[0])
    assert shown(args["state"]) == shown(before[1])
    assert args["state"].read().cycle == before[1].read().cycle + 1


def flat(args: dict[str, Any]) -> tuple[Any, ...]:
    state, lists, store, rule = args["state"], args["lists"], args["store"], args["rule"]
    return (
        args["k"], args["v"], state.levels, state.index, state.slots, state.born, state.pos, state.bias, state.numbers,
        lists.edits, lists.inserted, lists.moves, lists.children, lists.wanted, store.k, store.v, store.keys,
        store.rows, args["scores"], args["counts"], args["pinned"],
        [x for w in args["weights"] for x in w.tensors()], rule.block_size, rule.budget, rule.cooldown, -1,
        rule.min_gain, rule.hysteresis, rule.gist_bias, "ref",
    )  # fmt: skip


def test_opcheck() -> None:
    args = SMALL[2].make(torch.float32)
    torch.library.opcheck(torch.ops.mc.refocus_.default, flat({**args, "k": args["k"].clone(), "v": args["v"].clone()}))


def test_it_compiles() -> None:
    args = SMALL[2].make(torch.float32)
    want = {**args, "k": args["k"].clone(), "v": args["v"].clone(), "state": args["state"].clone(), "lists": None}
    refocus_(**want, backend="ref")
    rest = {name: args[name] for name in ("state", "store", "counts", "pinned", "weights", "rule", "lists")}

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(k: Tensor, v: Tensor, scores: Tensor) -> None:
        refocus_(k, v, scores=scores * 1.0, **rest, backend="ref")

    k, v = args["k"].clone(), args["v"].clone()
    step(k, v, args["scores"])
    assert torch.equal(k, want["k"])
    assert torch.equal(args["state"].levels, want["state"].levels)
    assert args["state"].read() == want["state"].read()


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The argument, or a field of it, with another value."""

    def apply(args: dict[str, Any]) -> dict[str, Any]:
        outer, _, inner = name.partition(".")
        if not inner:
            return args | {outer: change(args[outer])}
        fields = dict(vars(args[outer]))
        return args | {outer: type(args[outer])(**fields | {inner: change(fields[inner])})}

    return apply


REFUSED = {
    "dtype": (TypeError, "v: expected dtype float32 as k", changed("v", Tensor.half)),
    "k": (TypeError, "k: expected dtype float32", changed("k", Tensor.int)),
    "shape": (ValueError, r"v: expected shape \[L, Hkv, S, D\] with", changed("v", lambda x: x[:, :, 1:])),
    "columns": (ValueError, "k: expected a contiguous last dimension", changed("k", lambda x: x.mT.contiguous().mT)),
    "overlap": (
        ValueError, "k: expected a view without overlap",
        changed("k", lambda x: x[:, :, :1].contiguous().expand(x.shape)),
    ),
    "shared": (ValueError, "v: expected memory apart from the cache", lambda args: args | {"v": args["k"]}),
    "store": (
        ValueError, "store.v: expected memory apart from the cache",
        lambda args: args | {"store": GistStore(args["k"].clone(), args["k"], *list(vars(args["store"]).values())[2:])},
    ),
    "weights' gradient": (
        ValueError, r"weights\[1\]: expected no gradient",
        changed("weights", lambda w: [w[0], dataclasses.replace(w[1], c=w[1].c.clone().requires_grad_())]),
    ),
    "gradient": (ValueError, "k: expected no gradient", changed("k", lambda x: x.clone().requires_grad_())),
    "no weights": (ValueError, "weights: expected those of 1 to 4 levels, got 0", changed("weights", lambda x: [])),
    "weights": (TypeError, r"weights\[0\]: expected GistPoolWeights", changed("weights", lambda x: [x[0].w])),
    "block": (
        ValueError, r"weights\[0\]: expected L=1, Hkv=1, G=1, K=3, D=4, got",
        changed("weights", lambda x: [GistPoolWeights.zeros(1, 1, 1, 5, 4)]),
    ),
    "budget": (ValueError, r"rule.budget: expected at most the \d+ slots", changed("rule.budget", lambda x: 10_000)),
    "levels": (TypeError, "state.levels: expected dtype int32", changed("state.levels", Tensor.long)),
    "slots": (ValueError, r"state.slots: expected shape \[S\] with S=", changed("state.slots", lambda x: x[1:])),
    "numbers": (ValueError, r"state.numbers: expected shape \[8\]", changed("state.numbers", lambda x: x[:4])),
    "bias": (TypeError, "state.bias: expected dtype float32", changed("state.bias", Tensor.double)),
    "keys": (ValueError, "store.rows: expected shape", changed("store.keys", lambda x: x[1:])),
    "scores": (TypeError, "scores: expected dtype float32", changed("scores", Tensor.double)),
    "strided": (
        ValueError, "scores: expected a contiguous tensor", changed("scores", lambda x: x.t().contiguous().t()),
    ),
    "counts": (ValueError, "counts: expected the number of tokens", changed("counts", lambda x: x[:0])),
    "pinned": (ValueError, r"pinned: expected shape \[P, 2\]", changed("pinned", lambda x: x.flatten())),
    "lists": (ValueError, r"lists.moves: expected shape \[S, 2\]", changed("lists.moves", lambda x: x[:, :1])),
    "device": (TypeError, "scores: expected device cpu as k", changed("scores", lambda x: x.to("meta"))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    error, words, change = REFUSED[name]
    args = SMALL[2].make(torch.float32)
    before = [args["k"].clone(), args["state"].clone()]
    with pytest.raises(error, match=words):
        refocus_(**change(args), backend="ref")
    assert torch.equal(args["k"], before[0])
    assert torch.equal(args["state"].numbers, before[1].numbers)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("block_size", 1, "block_size: expected an integer of at least 2, got 1"),
        ("budget", -1, "budget: expected an integer of at least 0"),
        ("cooldown", 1.5, "cooldown: expected an integer of at least 0, got 1.5"),
        ("max_edits", -1, "max_edits: expected an integer of at least 0"),
        ("min_gain", float("nan"), "min_gain: expected nats between 0 and 1e"),
        ("hysteresis", -0.1, "hysteresis: expected nats between 0 and 1e"),
        ("gist_bias", float("inf"), "gist_bias: expected a finite number"),
    ],
)
def test_rules_are_checked(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RefocusRule(**({"block_size": 32, "budget": 8} | {name: value}))


def test_states_are_checked() -> None:
    with pytest.raises(ValueError, match="levels: expected at most 2 entries"):
        RefocusState.of([0, 0, 0], [0, 1, 2], 2)
    with pytest.raises(ValueError, match=r"slots: expected a permutation of 0\.\.1"):
        RefocusState.of([0, 0], [0, 1], 4, slots=[0, 0])
    state = RefocusState.of([1, 0], [0, 2], 4, slots=[1, 0], gist_bias=0.25)
    assert state.pos.tolist() == [1, 0, -1, -1]
    assert state.bias is not None
    assert state.bias.tolist() == [0, 0.25, 0, 0]
    assert RefocusLists.allocate(4, 1).edits.shape == (4, 3)
