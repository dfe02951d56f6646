"""Refocus: score, allocate, splice, for one Working Context."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import BudgetError, InputError
from ..profiling import timed
from .allocator import Allocation, Cooldown, FocusProblem, allocate, base_slots, pinned_nodes
from .view import Floats, FocusPolicy, FocusView, Ints, Utilities, add_utilities

if TYPE_CHECKING:
    from ..config import MemoryConfig, RefreshMode
    from ..layout import Layout
    from ..retrieval import BlockIndex

Expanded = dict[int, Ints]

# Nats that a hint gives to the nodes it names: more than a policy's best block.
HINT_NATS = 2.0
# Share of the budget that the turn under way may keep at full detail.
TURN_SHARE = 8


@dataclass(frozen=True)
class RefocusReport:
    """What one refocus did. seconds: wall clock of scoring, allocation, splice and recomputation together.
    last_hidden: final hidden state [E] of the newest entry, if it was recomputed."""

    expanded: int
    collapsed: int
    recomputed: int
    seconds: float
    last_hidden: torch.Tensor | None

    @property
    def edits(self) -> int:
        return self.expanded + self.collapsed


def _difference(a: Expanded, b: Expanded) -> list[tuple[int, int]]:
    """Nodes (level, index) of `a` that are not in `b`."""
    nothing = np.zeros(0, np.int64)
    return [(level, int(i)) for level in a for i in np.setdiff1d(a[level], b.get(level, nothing))]


class FocusController:
    """Decides what a context shows, cycle by cycle.

    head: tokens at the start that stay at full detail (the attention sink and the system prompt). pins: further token
    ranges that do. hints: utilities added to the policy's. turn_start: first token of the turn that is under way, of
    which the newest `turn_tokens` are kept too.
    """

    def __init__(self, policy: FocusPolicy, config: MemoryConfig, retrieval: BlockIndex, head: int) -> None:
        self.policy, self.config, self.retrieval, self.head = policy, config, retrieval, head
        self.cooldown = Cooldown(config.focus.cooldown)
        self.cycle = 0
        self.turn_start: int | None = None
        self.turn_tokens = max(config.recent_tokens, config.budget // TURN_SHARE)
        self.pins: list[tuple[int, int]] = []
        self.hints: Utilities = {}
        self.utility: Utilities = {}

    def branch(self) -> FocusController:
        """A copy for a branch of the context."""
        other = FocusController(self.policy, self.config, self.retrieval, self.head)
        other.load_state(self.state())
        return other

    def pinned(self, length: int) -> list[tuple[int, int]]:
        """Token ranges at full detail in a history of `length` tokens: head, newest tokens, present turn, pins."""
        ranges = [(0, min(max(self.head, 1), length)), (self._recent_start(length), length), *self.pins]
        return [(start, min(stop, length)) for start, stop in ranges if start < min(stop, length)]

    def _recent_start(self, length: int) -> int:
        """First token of the newest ones, and of the present turn, that are kept."""
        recent = max(0, length - self.config.recent_tokens)
        return recent if self.turn_start is None else min(recent, max(self.turn_start, length - self.turn_tokens))

    def least_slots(self, context: Layout) -> int:
        """Slots of the coarsest layout that shows what is pinned."""
        size, counts = self.config.block_size, context.counts
        pins = pinned_nodes(size, counts, self.pinned(context.length))
        return base_slots(size, counts) + (size - 1) * sum(len(index) for index in pins.values())

    def hint_span(self, start: int, stop: int) -> None:
        """Ask for a span at full detail from the next refocus on, while the budget allows."""
        size = self.config.block_size
        blocks = np.arange(start // size, -(-stop // size), dtype=np.int64)
        self.hints = {1: (blocks, np.full(len(blocks), HINT_NATS))}

    def refocus(
        self,
        context: Layout,
        *,
        query: str,
        mass: Floats | None = None,
        reserve: int = 0,
        newest: int = 0,
        mode: RefreshMode | None = None,
        new_turn: bool = False,
    ) -> RefocusReport:
        """One cycle: the policy scores, the allocator decides, the cache is edited.

        reserve: slots to leave free for the tokens of the coming cycle. newest: last entries to recompute on whatever
        is edited. mode: refresh mode, by default the configuration's. Raises BudgetError if the budget cannot hold
        what is pinned.
        new_turn: the user has said something new. Nothing is frozen then, and what the policy sees no use in is
        collapsed although there is room: text that does not matter distracts a small model more than it helps.
        """
        with timed("refocus") as timer:
            self.cycle += 1
            expanded = context.synced_expanded()
            if new_turn:
                self.cooldown = Cooldown(self.config.focus.cooldown)
                self.retrieval.update()
            with timed("score"):
                recent = self._recent_start(context.length)
                asked = self.turn_start is not None
                view = FocusView(context, expanded, query, mass, self.retrieval, recent, asked)
                self.utility = self._in_tree(context, self.policy.utilities(view))
            start = self._useful(context, expanded) if new_turn else expanded
            target = self._allocate(context, start, reserve).expanded
            changed = context.relayout(target, newest=newest, mode=mode)
            opened, closed = _difference(target, expanded), _difference(expanded, target)
            self.cooldown.record(opened + closed, self.cycle)
        return RefocusReport(len(opened), len(closed), changed.recomputed, timer.seconds, changed.last_hidden)

    def _useful(self, context: Layout, expanded: Expanded) -> Expanded:
        """The expanded nodes that are pinned or useful, or lie above such a node."""
        size, counts = self.config.block_size, context.counts
        utility = add_utilities([(1.0, self.utility), (1.0, self.hints)])
        pins = pinned_nodes(size, counts, self.pinned(context.length))
        kept: Expanded = {}
        below = np.zeros(0, np.int64)
        for level in range(1, len(counts)):
            nodes, nats = utility.get(level, (np.zeros(0, np.int64), np.zeros(0)))
            wanted = (nodes[nats >= self.config.focus.min_gain], pins.get(level, below[:0]), below // size)
            kept[level] = np.intersect1d(expanded.get(level, below[:0]), np.concatenate(wanted))
            below = kept[level]
        return kept

    def make_room(self, context: Layout, count: int, *, mode: RefreshMode | None = None) -> int:
        """Collapse the cheapest siblings, by the latest utilities, until `count` slots are free; returns the number of
        nodes that changed. Nothing happens if they are free already. mode: refresh mode, by default the
        configuration's."""
        if context.used + count <= self.config.budget and context.entries.stop == context.length:
            return 0
        allocation = self._allocate(context, context.synced_expanded(), count)
        context.relayout(allocation.expanded, mode=mode)
        return len(allocation.expand) + len(allocation.collapse)

    def _allocate(self, context: Layout, expanded: Expanded, reserve: int) -> Allocation:
        counts = context.counts
        utility = self._in_tree(context, add_utilities([(1.0, self.utility), (1.0, self.hints)]))
        frozen = {
            level: nodes[nodes < counts[level]]
            for level, nodes in self.cooldown.frozen(self.cycle).items()
            if level < len(counts)
        }
        problem = FocusProblem(
            block_size=self.config.block_size,
            counts=counts,
            expanded=expanded,
            utility=utility,
            pinned=self.pinned(context.length),
            budget=self.config.budget - reserve,
            frozen=frozen,
        )
        with timed("allocate"):
            try:
                return allocate(problem, self.config.focus)
            except BudgetError as error:
                raise BudgetError(
                    f"{error} ({reserve} of {self.config.budget} slots are reserved for coming tokens; {self.head} "
                    f"first ones, {self.config.recent_tokens} recent ones and {len(self.pins)} pins are kept in full)"
                ) from None

    @staticmethod
    def _in_tree(context: Layout, utility: Utilities) -> Utilities:
        """Without nodes that the tree does not hold (yet)."""
        result = {}
        for level, (nodes, nats) in utility.items():
            known = nodes < context.tree.count(level) if level <= context.tree.n_levels else np.zeros(len(nodes), bool)
            if known.any():
                result[level] = (nodes[known], nats[known])
        return result

    def state(self) -> dict[str, Any]:
        """JSON-able; `load_state` continues from it."""

        def plain(utility: Utilities) -> dict[str, Any]:
            return {str(level): [nodes.tolist(), nats.tolist()] for level, (nodes, nats) in utility.items()}

        return {
            "cycle": self.cycle,
            "cooldown": self.cooldown.to_dict(),
            "pins": self.pins,
            "hints": plain(self.hints),
            "utility": plain(self.utility),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave. Raises InputError for anything else."""

        def arrays(data: Mapping[str, Any]) -> Utilities:
            return {
                int(level): (np.asarray(nodes, np.int64), np.asarray(nats, np.float64))
                for level, (nodes, nats) in data.items()
            }

        try:
            self.cycle = int(state["cycle"])
            self.cooldown = Cooldown.from_dict(state["cooldown"])
            self.pins = [(int(a), int(b)) for a, b in state["pins"]]
            self.hints, self.utility = arrays(state["hints"]), arrays(state["utility"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"focus state: expected what `state` gave, got something else ({error})") from error
