"""What the tests of `refocus_` compare with: the numpy allocator, and the runtime's own way to a new layout."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mc_kernels import SplicePlan
from mc_kernels.refocus import RefocusLists, RefocusState
from mc_kernels.refocus.rule import MOST_NATS
from mc_runtime.focus.allocator import Allocation, FocusParams, layout_entries
from mc_runtime.focus.one_level import one_level
from mc_runtime.timeline import Entries, diff_entries

STATE = ("levels", "index", "slots", "born", "pos", "bias", "numbers")
LISTS = ("edits", "inserted", "moves", "children", "wanted")


class Layout(NamedTuple):
    entries: Entries
    counts: tuple[int, ...]


def layout_of(args: dict[str, Any]) -> Layout:
    state, n = args["state"], args["state"].read().length
    levels, index = state.levels[:n].cpu().numpy().astype(np.int8), state.index[:n].cpu().numpy()
    counts = args["counts"].tolist()
    while len(counts) > 1 and not counts[-1]:
        counts.pop()
    return Layout(Entries(levels, index, args["rule"].block_size), tuple(counts))


def resting(args: dict[str, Any]) -> dict[int, np.ndarray]:
    """The nodes that may not change in the coming cycle, by what the state says of entries."""
    entries, _ = layout_of(args)
    size, cycle = entries.block_size, args["state"].read().cycle + 1
    nodes: dict[int, set[int]] = {}
    born = args["state"].born[: len(entries)].tolist()
    for level, index, at in zip(entries.levels.tolist(), entries.index.tolist(), born, strict=True):
        if abs(at) < cycle <= abs(at) + args["rule"].cooldown:
            if at < 0:
                nodes.setdefault(level, set()).add(index)
            elif at > 0 and index % size == 0:
                nodes.setdefault(level + 1, set()).add(index // size)
    return {level: np.array(sorted(index)) for level, index in nodes.items()}


def allocation(args: dict[str, Any], frozen: dict[int, np.ndarray] | None = None) -> Allocation:
    """What the numpy allocator decides."""
    (entries, counts), state, rule = layout_of(args), args["state"], args["rule"]
    scores = args["scores"].cpu()[state.slots[: len(entries)].cpu()].double().numpy()
    keys = set((args["keys"] if "keys" in args else args["store"].keys).tolist())
    size = entries.block_size
    return one_level(
        entries,
        counts,
        np.nan_to_num(scores, nan=0.0).clip(-MOST_NATS, MOST_NATS),
        lambda level, index: index * size**level * 64 + level in keys,
        rule.budget,
        FocusParams(rule.min_gain, rule.hysteresis, 0, rule.max_edits),
        pinned=args["pinned"].tolist(),
        resting=resting(args) if frozen is None else frozen,
    )


class Relaid(NamedTuple):
    """The layout that an allocation leads to, and the plan of the splice that the runtime would make."""

    entries: Entries
    plan: SplicePlan


def relaid(args: dict[str, Any], chosen: Allocation) -> Relaid:
    old, counts = layout_of(args)
    new = Entries(*layout_entries(old.block_size, counts, chosen.expanded), old.block_size)
    state = args["state"]
    plan = SplicePlan.from_edits(
        len(old), diff_entries(old, new).edits, capacity=state.capacity, discipline="slots",
        slots=state.slots[: len(old)].cpu(),
    )  # fmt: skip
    return Relaid(new, plan)


def assert_relaid(args: dict[str, Any], want: Relaid, chosen: Allocation) -> None:
    """State and lists, after the refocus, are those of the allocation."""
    state, lists, rule, n = args["state"], args["lists"], args["rule"], len(want.entries)
    numbers = state.read()
    assert (numbers.length, numbers.opened, numbers.closed) == (n, len(chosen.expand), len(chosen.collapse))
    assert np.array_equal(state.levels[:n].cpu().numpy(), want.entries.levels)
    assert np.array_equal(state.index[:n].cpu().numpy(), want.entries.index)
    assert torch.equal(state.slots[:n].cpu(), want.plan.new_slots)
    pos = torch.full((state.capacity,), -1)
    pos[want.plan.new_slots] = torch.arange(n)
    assert torch.equal(state.pos.cpu(), pos)
    assert numbers.over == max(n - rule.budget, 0)
    assert numbers.inserted == want.plan.n_insert
    assert torch.equal(lists.inserted[: numbers.inserted, 0].cpu().long(), want.plan.insert_slots)
    assert torch.equal(lists.moves[: numbers.moved].cpu().long(), want.plan.moves)
    edits = lists.edits[: numbers.opened + numbers.closed].cpu().long()
    assert int((edits[:, 2] - edits[:, 1]).sum()) == n - want.plan.length
    assert torch.equal(
        torch.cat([torch.arange(int(e[0]), int(e[0] + e[1])) for e in edits] or [edits.new_empty(0)]),
        torch.nonzero(torch.from_numpy(want.plan.arrays.rank_map) < 0).flatten(),
    )


def flat(args: dict[str, Any], k: Tensor, v: Tensor, store: tuple[Tensor, ...], weights: list[Tensor]) -> list[Any]:
    """The arguments in the order of the op's schema, but for `backend`; store: k, v, keys, rows."""
    state, lists, rule = args["state"], args["lists"], args["rule"]
    return [
        k, v, state.levels, state.index, state.slots, state.born, state.pos, state.bias, state.numbers,
        *(getattr(lists, name) for name in LISTS), *store, args["scores"], args["counts"], args["pinned"], weights,
        rule.block_size, rule.budget, rule.cooldown, -1 if rule.max_edits is None else rule.max_edits, rule.min_gain,
        rule.hysteresis, rule.gist_bias,
    ]  # fmt: skip


def flat_of(args: dict[str, Any]) -> list[Any]:
    store = args["store"]
    weights = [x for w in args["weights"] for x in w.tensors()]
    return flat(args, args["k"], args["v"], (store.k, store.v, store.keys, store.rows), weights)


def without_layers(args: dict[str, Any], keys: Tensor, rows: Tensor) -> list[Any]:
    """The same for a cache of no layers: what is decided and planned, and nothing more."""
    size, device = args["rule"].block_size, keys.device
    weights = [torch.empty(0, 1, *shape, device=device) for shape in ((1, 2), (1, size), (2, 2), (2,))]
    k, v = (torch.empty(0, 1, args["state"].capacity, 1, device=device) for _ in range(2))
    return flat(args, k, v, (k[:, :, :0], v[:, :, :0], keys, rows), weights)


def copied(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments with memory of its own for all that is written."""
    lists = RefocusLists(*(getattr(args["lists"], name).clone() for name in LISTS))
    out = {**args, "state": args["state"].clone(), "lists": lists}
    if "k" in args:
        cache = torch.stack((args["k"], args["v"]), dim=1)
        out |= {"k": cache[:, 0], "v": cache[:, 1]}
    return out


def same_state(a: RefocusState, b: RefocusState) -> bool:
    return all(torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()) for name in STATE)


def same_lists(a: RefocusLists, b: RefocusLists) -> bool:
    return all(torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()) for name in LISTS)
