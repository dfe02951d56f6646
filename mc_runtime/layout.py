"""What a context shows, apart from how the model comes to see it.

`Layout` is the part that every kind of engine shares: entries that tile the history, tokens that the tree does not hold
yet, the vectors that stand for entries, and the transaction that makes tokens durable. `WorkingContext` adds a cache
that is edited in place, `PromptContext` (`mc_runtime.served`) hands the vectors to an engine that keeps its cache to
itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .config import MemoryConfig, RefreshMode
from .engines import Engine
from .errors import BudgetError
from .focus.allocator import layout_entries
from .gists import GistReader
from .nodes import NodeBuilder, Nodes
from .timeline import Entries
from .tree import Transaction, Tree

Expanded = dict[int, NDArray[np.int64]]
NO_NODES = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Relayout:
    """What a change of layout did: entries inserted, removed and run through the model, and the final hidden state
    [E] of the newest entry if that one was run."""

    inserted: int
    removed: int
    recomputed: int
    last_hidden: Tensor | None


class Layout(ABC):
    """entries: in timeline order. expanded: level -> sorted node indices. counts_seen: `counts` when it was laid out.
    pending: token ids that are shown but are not in the tree yet. capacity: slots that a layout may take."""

    def __init__(self, tree: Tree, engine: Engine, reader: GistReader, config: MemoryConfig, capacity: int) -> None:
        self.tree, self.reader, self.config, self.capacity = tree, reader, config, capacity
        self.engine, self.decoder = engine, engine.decoder
        self.pending: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Show nothing; pending tokens stay."""
        self.entries = Entries(np.zeros(0, np.int8), NO_NODES, self.config.block_size)
        self.expanded: Expanded = {}
        self.counts_seen: tuple[int, ...] = ()

    def clear(self) -> None:
        """Forget the layout and what stands for it; pending tokens stay."""
        self.forget()

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """What ends a change early (Ctrl-C too) leaves an empty context, which is laid out anew when it is next
        needed."""
        try:
            yield
        except BaseException:
            self.clear()
            raise

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self.entries)

    @property
    def length(self) -> int:
        """Tokens of history, pending ones included."""
        return self.tree.length + len(self.pending)

    @property
    def counts(self) -> tuple[int, ...]:
        """(tokens, level-1 nodes, level-2 nodes, ...), as the allocator wants them."""
        return (self.length, *(self.tree.count(level) for level in range(1, self.tree.n_levels + 1)))

    @abstractmethod
    def relayout(self, expanded: Expanded, *, mode: RefreshMode | None = None, newest: int = 0) -> Relayout:
        """Show the layout of `expanded`; the history may have grown in the tree meanwhile.

        mode: refresh mode, by default the configuration's. newest: last entries to recompute in any case.
        Raises BudgetError, before anything changes, if the layout does not fit.
        """

    def entries_of(self, expanded: Expanded) -> Entries:
        """Entries of a layout of the present history. Raises BudgetError if there are not enough slots."""
        new = Entries(*layout_entries(self.config.block_size, self.counts, expanded), self.config.block_size)
        if len(new) > self.capacity:
            raise BudgetError(
                f"budget: the layout needs {len(new)} slots, the cache has {self.capacity}; give a larger budget"
            )
        return new

    def show(self, entries: Entries, expanded: Expanded) -> None:
        """Record what is shown."""
        self.entries = entries
        self.expanded = {level: np.asarray(nodes, np.int64) for level, nodes in expanded.items() if len(nodes)}
        self.counts_seen = self.counts

    def synced_expanded(self) -> Expanded:
        """`expanded`, extended to the nodes that the tree has gained since the last layout: such a node is expanded if
        a part of its span stands in the context (it can only stand there in finer detail), else collapsed."""
        stop, synced = self.entries.stop, {}
        for level in range(1, self.tree.n_levels + 1):
            known = self.counts_seen[level] if level < len(self.counts_seen) else 0
            reached = min(self.tree.count(level), -(-stop // self.config.block_size**level))
            synced[level] = np.concatenate((self.expanded.get(level, NO_NODES), np.arange(known, reached)))
        return synced

    def inputs(self, ranks: NDArray[np.int64]) -> Tensor:
        """[T, E] input rows of entries: token embeddings, or the vectors of gists of kind `embedding`."""
        levels, index = self.entries.levels[ranks], self.entries.index[ranks]
        rows = torch.empty(len(ranks), self.decoder.config.embed_dim, dtype=self.decoder.dtype)
        rows = rows.to(self.decoder.device)
        tokens, gists = (levels == 0).nonzero()[0], (levels > 0).nonzero()[0]
        if len(tokens):
            rows[torch.from_numpy(tokens)] = self.engine.embed(self.ids(index[tokens])[None])[0]
        if len(gists):
            rows[torch.from_numpy(gists)] = self.reader.read(self.tree, levels[gists], index[gists]).embeddings
        return rows

    def ids(self, index: NDArray[np.int64]) -> Tensor:
        """Token ids at positions `index` of the history, pending ones included: [len(index)] int64."""
        stored = index < self.tree.length
        ids = np.empty(len(index), np.int64)
        ids[stored] = self.tree.tokens()[index[stored]]
        ids[~stored] = np.asarray(self.pending, np.int64)[index[~stored] - self.tree.length]
        return torch.from_numpy(ids).to(self.decoder.device)

    def commit(self, builder: NodeBuilder, also: Callable[[Transaction, int, int], None]) -> None:
        """Write the pending tokens, and every node that they complete, to the tree in one transaction.

        also: called inside the transaction with it and the tokens' span, to record what they are. If anything fails
        the tree stays as it was and the tokens stay pending.
        """
        nodes, before = self._completed_blocks(builder), self.tree.length
        try:
            with self.tree.begin() as transaction:
                start, stop = transaction.append_tokens(np.asarray(self.pending, np.int64))
                if nodes is not None:
                    builder.push(transaction, nodes)
                also(transaction, start, stop)
        except BaseException:
            builder.reload()
            raise
        finally:
            if self.tree.length > before:  # also where Ctrl-C came while the commit was being written
                self.pending.clear()
                self.expanded, self.counts_seen = self.synced_expanded(), self.counts

    @abstractmethod
    def _completed_blocks(self, builder: NodeBuilder) -> Nodes | None:
        """Level-1 nodes of the blocks that the pending tokens complete; None if they complete none."""

    def open_blocks(self) -> tuple[int, int]:
        """(first, count) of the blocks that pending tokens have completed and that are not in the tree yet."""
        first = self.tree.count(1)
        return first, max(0, self.length // self.config.block_size - first)

    def summaries(self, builder: NodeBuilder, first: int, count: int) -> Tensor:
        """[count, E] summary vectors of token blocks, from their embeddings."""
        size = self.config.block_size
        ids = self.ids(np.arange(first * size, (first + count) * size))
        return builder.net.encode(self.engine.embed(ids.view(count, size)))
