"""What `refocus_` works on: a Working Context, a store of entries to insert, and the lists of what was done, all in
tensors of fixed sizes, so that a graph that is captured once serves whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = 8  # of `RefocusState.numbers`
LAST_KEY = torch.iinfo(torch.int64).max
MAX_NATS = 1e9


class Numbers(NamedTuple):
    """`RefocusState.numbers`, read: entries; refocus cycles so far; then what the last one did: gists opened, groups
    closed, slots over the budget that nothing could free, entries that got another slot, entries inserted, gists that
    would have opened had their children been in the store."""

    length: int
    cycle: int
    opened: int
    closed: int
    over: int
    moved: int
    inserted: int
    wanted: int


@dataclass(frozen=True)
class RefocusRule:
    """How a refocus decides; see `refocus_`. Raises ValueError for values out of range.

    block_size: children per node, at least 2. budget: entries, at most the cache's slots. min_gain, hysteresis: nats,
    0..1e9. cooldown: cycles for which a node that changed rests. max_edits: nodes that change in one refocus, None for
    any; groups that must close for the budget count and close in any case. gist_bias: log-weight of gists where the
    state has weights.
    """

    block_size: int
    budget: int
    min_gain: float = 0.02
    hysteresis: float = 0.02
    cooldown: int = 3
    max_edits: int | None = None
    gist_bias: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("block_size", 2), ("budget", 0), ("cooldown", 0), ("max_edits", 0)):
            value = getattr(self, name)
            if not (name == "max_edits" and value is None) and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        for name in ("min_gain", "hysteresis"):
            if not 0 <= getattr(self, name) <= MAX_NATS:
                raise ValueError(f"{name}: expected nats between 0 and {MAX_NATS:g}, got {getattr(self, name)!r}")
        if not abs(self.gist_bias) < float("inf"):
            raise ValueError(f"gist_bias: expected a finite number, got {self.gist_bias!r}")


@dataclass(frozen=True, eq=False)
class RefocusState:
    """A Working Context of N entries in timeline order over S slots of a cache, on the device; `refocus_` updates it.

    By rank, of which the first N count: levels [S] int32 and index [S] int64, entry r is node (levels[r], index[r]), a
    token where the level is 0; slots [S] int64, of the first N a permutation of 0..N-1; born [S] int32, +t where the
    entry came by the opening of its parent in cycle t, -t where its children closed into it, 0 where neither.
    By slot: pos [S] int64, the rank, -1 where empty; bias [S] fp32, or None where all entries weigh alike.
    numbers [8] int64, see `Numbers`.

    To append an entry write its row at rank N, slot N, and add one to numbers[0]; that too is work for the stream.
    """

    levels: Tensor
    index: Tensor
    slots: Tensor
    born: Tensor
    pos: Tensor
    numbers: Tensor
    bias: Tensor | None = None

    @classmethod
    def of(
        cls,
        levels: Sequence[int] | Tensor,
        index: Sequence[int] | Tensor,
        capacity: int,
        *,
        slots: Sequence[int] | Tensor | None = None,
        gist_bias: float | None = None,
        device: torch.device | str = "cpu",
    ) -> RefocusState:
        """The state of N entries, before any refocus. slots: by rank, by default the rank. gist_bias: the log-weight of
        gists, None for a state without weights. Raises ValueError for entries that do not fit."""
        level, node = torch.as_tensor(levels, dtype=torch.int32), torch.as_tensor(index, dtype=torch.int64)
        n = level.shape[0]
        slot = torch.arange(n) if slots is None else torch.as_tensor(slots, dtype=torch.int64)
        if not (level.shape == node.shape == slot.shape == (n,) and n <= capacity):
            shapes = f"{list(level.shape)}, {list(node.shape)} and {list(slot.shape)}"
            raise ValueError(f"levels: expected at most {capacity} entries, index and slots of the same, got {shapes}")
        if not torch.equal(slot.cpu().sort().values, torch.arange(n)):
            raise ValueError(f"slots: expected a permutation of 0..{n - 1}")

        def rows(x: Tensor, fill: int) -> Tensor:
            out = torch.full((capacity,), fill, dtype=x.dtype, device=device)
            out[:n] = x.to(device)
            return out

        by_rank = (rows(level, 0), rows(node, 0), rows(slot, 0))
        pos, bias = torch.full((capacity,), -1, dtype=torch.int64, device=device), None
        pos[by_rank[2][:n]] = torch.arange(n, device=device)
        if gist_bias is not None:
            bias = torch.zeros(capacity, device=device)
            bias[by_rank[2][:n]] = (by_rank[0][:n] > 0).float() * gist_bias
        numbers = torch.zeros(NUMBERS, dtype=torch.int64, device=device)
        numbers[0] = n
        return cls(*by_rank, torch.zeros(capacity, dtype=torch.int32, device=device), pos, numbers, bias)

    @property
    def capacity(self) -> int:
        return self.levels.shape[0]

    def clone(self) -> RefocusState:
        """A copy in memory of its own."""
        kept = {name: getattr(self, name).clone() for name in ("levels", "index", "slots", "born", "pos", "numbers")}
        return RefocusState(**kept, bias=None if self.bias is None else self.bias.clone())

    def read(self) -> Numbers:
        """The numbers on the host: waits for the device."""
        return Numbers(*self.numbers.tolist())


@dataclass(frozen=True, eq=False)
class GistStore:
    """Keys and values that a refocus may insert, on the device.

    k, v [L, Hkv, M, D], keys unrotated, any strides with a contiguous last dimension. keys [T] int64 ascending: the
    gists whose children are there, each named by `node_key`; rows [T] int32: the first of the K rows, in timeline
    order, that they have. Unused ends of `keys` hold the largest int64.
    """

    k: Tensor
    v: Tensor
    keys: Tensor
    rows: Tensor


def node_key(level: int, index: int, block_size: int) -> int:
    """What names a node in a `GistStore`: its first token and its level."""
    return index * block_size**level * 64 + level


@dataclass(frozen=True, eq=False)
class RefocusLists:
    """What a refocus did; `RefocusState.numbers` says how much of each list counts. All on the device.

    edits [S, 3] int32: (start, remove, insert) in ranks of before, ascending: opened and closed ones. inserted [S, 2]
    int32, in timeline order: slot, and row of the store or -1 - g for the gist of the g-th closed group. moves [S, 2]
    int32: slot before and after of entries that got another one. children [S] int32: the K slots of before of each
    closed group. wanted [n_wanted] int64: keys of the gists that would have opened had their children been in the
    store, in timeline order, as many as fit.
    """

    edits: Tensor
    inserted: Tensor
    moves: Tensor
    children: Tensor
    wanted: Tensor

    @classmethod
    def allocate(cls, capacity: int, n_wanted: int, device: torch.device | str = "cpu") -> RefocusLists:
        """Lists for a cache of `capacity` slots."""

        def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            new(capacity, 3), new(capacity, 2), new(capacity, 2), new(capacity), new(n_wanted, dtype=torch.int64)
        )
