"""A Working Context for engines that keep their cache to themselves: a layout, and the vectors that stand for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .config import MemoryConfig, RefreshMode
from .engines import Engine
from .errors import BudgetError
from .gists import EmbeddingReader
from .layout import Expanded, Layout, Relayout
from .nodes import NodeBuilder, Nodes
from .timeline import Entries, diff_entries
from .tree import Tree


class PromptContext(Layout):
    """Edits cost nothing here and recompute nothing: the engine reads what is behind the first changed entry anew.
    Gists are of kind `embedding`."""

    def __init__(self, tree: Tree, engine: Engine, reader: EmbeddingReader, config: MemoryConfig) -> None:
        super().__init__(tree, engine, reader, config, config.budget)

    def rows(self) -> Tensor:
        """[N, E] in the engine's dtype: the vector of each entry, in timeline order."""
        return self.inputs(np.arange(self.used))

    def relayout(self, expanded: Expanded, *, mode: RefreshMode | None = None, newest: int = 0) -> Relayout:
        """mode and newest say what is recomputed: nothing here. Whatever ends it early leaves an empty context."""
        new = self.entries_of(expanded)
        diff = diff_entries(self.entries, new)
        with self._all_or_nothing():
            self.show(new, expanded)
        return Relayout(len(diff.inserted), len(diff.removed), 0, None)

    def append(self, ids: Sequence[int]) -> None:
        """Show new tokens at the end. Raises BudgetError, before anything changes, if there are not enough slots.
        Whatever else ends it early leaves an empty context, and all of the tokens pending or none."""
        used = self.used + len(ids)
        if used > self.capacity:
            raise BudgetError(f"budget: the new tokens need {used} slots, there are {self.capacity}")
        added = [int(i) for i in ids]
        with self._all_or_nothing():
            self.entries = self.entries.with_tokens(len(added))
            self.pending += added

    def drop_pending(self) -> None:
        """Forget the pending tokens, which are always the last entries."""
        count = self.entries.stop - self.tree.length
        self.pending.clear()
        if count <= 0:  # none, or the context is empty
            return
        kept = self.used - count
        self.entries = Entries(self.entries.levels[:kept], self.entries.index[:kept], self.config.block_size)

    def fork(self) -> PromptContext:
        """A branch: it may append and change its layout; it must not commit."""
        assert isinstance(self.reader, EmbeddingReader)
        branch = PromptContext(self.tree, self.engine, self.reader, self.config)
        branch.entries, branch.counts_seen, branch.pending = self.entries, self.counts_seen, list(self.pending)
        branch.expanded = {level: index.copy() for level, index in self.expanded.items()}
        return branch

    def _completed_blocks(self, builder: NodeBuilder) -> Nodes | None:
        first, blocks = self.open_blocks()
        if not blocks:
            return None
        with torch.no_grad():
            return Nodes(self.summaries(builder, first, blocks))
