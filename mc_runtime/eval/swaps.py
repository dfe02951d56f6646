"""How restless a focus is: nodes that refocuses open and close, and how long an opened block stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mc_runtime.context import WorkingContext

# (level, index)
Node = tuple[int, int]


@dataclass(frozen=True)
class Snapshot:
    """A layout. expanded: its expanded nodes. reach: by level, the first so many nodes have a part in it."""

    expanded: frozenset[Node]
    reach: Mapping[int, int]

    @classmethod
    def of(cls, context: WorkingContext) -> Snapshot:
        size, stop = context.config.block_size, context.entries.stop
        reach = {level: min(count, -(-stop // size**level)) for level, count in enumerate(context.counts) if level > 0}
        nodes = context.synced_expanded().items()
        return cls(frozenset((level, int(i)) for level, index in nodes for i in index), reach)

    def shows(self, node: Node) -> bool:
        return node[1] < self.reach.get(node[0], 0)


@dataclass(frozen=True)
class Cycle:
    """What one refocus changed, and the room that was made for it. slots: in use afterwards. recomputed: entries run
    again. filling: the history had just come in, so that the layout was filled rather than changed."""

    opened: frozenset[Node]
    closed: frozenset[Node]
    slots: int
    recomputed: int
    filling: bool = False


def changes(start: Snapshot, roomy: Snapshot, end: Snapshot) -> tuple[frozenset[Node], frozenset[Node]]:
    """Nodes opened and closed from `start` to `end`. What the tree gained meanwhile came in between `start` and
    `roomy`, before the refocus: how it came in is no change, what the refocus did with it is."""
    before = start.expanded | {node for node in roomy.expanded if not start.shows(node)}
    opened = frozenset(node for node in end.expanded - before if roomy.shows(node))
    return opened, before - end.expanded


def changed_share(cycle: Cycle, block_size: int) -> float:
    """Changed nodes per block of the context: per `block_size` slots in use."""
    return (len(cycle.opened) + len(cycle.closed)) / (cycle.slots / block_size)


@dataclass(frozen=True)
class Residency:
    """Stays of blocks that refocuses opened. faced: refocuses that came while such a block was open, the one that
    closed it included. closed: blocks that were closed again. shortest: stay of such a block, in cycles."""

    faced: int
    closed: int
    shortest: int | None

    @property
    def cycles(self) -> float | None:
        """Mean stay in refocus cycles, with the stays that the end of the run cut off taken into account (the
        maximum-likelihood mean of a geometric law with censoring); None if no block was closed."""
        return self.faced / self.closed if self.closed else None


def residency(runs: Sequence[Sequence[Cycle]]) -> Residency:
    """Of the blocks (nodes of level 1) that the cycles of each run opened."""
    faced, stays = 0, []
    for run in runs:
        since: dict[Node, int] = {}
        for number, cycle in enumerate(run):
            faced += len(since)
            stays += [number - since.pop(node) for node in cycle.closed if node in since]
            since |= {node: number for node in cycle.opened if node[0] == 1}
    return Residency(faced, len(stays), min(stays, default=None))
