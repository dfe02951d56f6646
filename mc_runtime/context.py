"""The Working Context: entries that tile the history, and their keys and values in a slot cache.

The entries follow from which stored nodes are *expanded* (see `mc_runtime.focus.allocator`). `relayout` edits the cache
in place to another set: gists bring their keys and values from the tree, tokens are recomputed in one batched forward
in which each sees only what precedes it. `append` runs new tokens at the end; they are *pending* until `commit` writes
them, and the nodes that they complete, to the tree. Positions are packed: an entry's position is its rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_kernels import Edit, SplicePlan

from .archive import BlockArchive
from .config import MemoryConfig, RefreshMode
from .engines import CacheEngine
from .errors import BudgetError
from .gists import GistReader
from .kv_cache import KVCache
from .layout import NO_NODES, Expanded, Layout, Relayout
from .model import DecoderOutput
from .nodes import NodeBuilder, Nodes
from .profiling import timed
from .refresh import entries_to_recompute
from .timeline import Entries, EntryDiff, diff_entries
from .tree import Tree


class WorkingContext(Layout):
    """One row of a cache and the entries in it.

    entries: in timeline order. slots: [N] int64 tensor, rank -> slot; slots [0, N) are in use at all times.
    expanded: level -> sorted node indices. pending: token ids that were run but are not in the tree yet.
    engine: what runs entries. decoder: the model's weights, for those that read them.
    """

    def __init__(
        self, tree: Tree, engine: CacheEngine, reader: GistReader, config: MemoryConfig, cache: KVCache
    ) -> None:
        super().__init__(tree, engine, reader, config, cache.capacity)
        self.engine: CacheEngine = engine
        self.cache = cache
        self.archive = BlockArchive(config.archive_kv)
        self.clear()

    # Tokens are read one by one, and nobody looks at the layout before the next refocus: what they add to it is written
    # down when somebody does.

    @property
    def entries(self) -> Entries:
        self._write_down()
        return self._entries

    @entries.setter
    def entries(self, entries: Entries) -> None:
        self._entries, self._behind = entries, 0

    @property
    def slots(self) -> Tensor:
        self._write_down()
        return self._slots

    @slots.setter
    def slots(self, slots: Tensor) -> None:
        self._slots = slots

    @property
    def used(self) -> int:
        """Slots in use."""
        return len(self._entries) + self._behind

    def _write_down(self) -> None:
        if self._behind:
            count, used = self._behind, self.used
            slots = torch.cat((self._slots, torch.arange(used - count, used, device=self._slots.device)))
            entries = self._entries.with_tokens(count)
            # Without a call in between, at which Ctrl-C could come.
            self._slots, self._entries, self._behind = slots, entries, 0

    def clear(self) -> None:
        """Forget the layout and what is in the cache; pending tokens stay."""
        self.forget()
        self.slots = torch.zeros(0, dtype=torch.int64, device=self.decoder.device)
        self.cache.set_ranks(self.slots)

    def bias_of(self, entries: Entries) -> Tensor | None:
        """[N] fp32: log-weights of entries by rank: gists `gist_bias`, tokens 0. None if all weigh alike."""
        if not self.config.gist_bias:
            return None
        gists = torch.from_numpy(entries.levels > 0).to(self.cache.pos.device)
        return gists.float() * self.config.gist_bias

    def fork(self, cache: KVCache) -> WorkingContext:
        """A branch over a copy of this cache's row: it may append and change its layout; it must not commit."""
        branch = WorkingContext(self.tree, self.engine, self.reader, self.config, cache)
        branch.entries, branch.slots = self.entries, self.slots.clone()
        branch.expanded = {level: index.copy() for level, index in self.expanded.items()}
        branch.counts_seen, branch.pending = self.counts_seen, list(self.pending)
        branch.archive = self.archive.copy()
        branch.cache.set_ranks(branch.slots, branch.bias_of(branch.entries))
        return branch

    def relayout(self, expanded: Expanded, *, mode: RefreshMode | None = None, newest: int = 0) -> Relayout:
        """Edit the cache, in place, to the layout of `expanded`. Whatever ends it early (Ctrl-C too) leaves an empty
        context, which is assembled anew when it is next needed: no entry stands there without its keys and values."""
        new = self.entries_of(expanded)
        diff = diff_entries(self.entries, new)
        with self._all_or_nothing():
            with timed("splice"):
                to_run = self._splice(new, diff)
            self.show(new, expanded)
            earliest = diff.edits[0].start if diff.edits else None
            ranks = entries_to_recompute(self, to_run, earliest, mode or self.config.refresh, newest)
            hidden = None
            if len(ranks):
                with timed("recompute"):
                    output = self.run(ranks)
                hidden = output.hidden[0, -1] if int(ranks[-1]) == len(new) - 1 else None
        return Relayout(len(diff.inserted), len(diff.removed), len(ranks), hidden)

    def _splice(self, new: Entries, diff: EntryDiff) -> NDArray[np.int64]:
        """Put `new` into the cache; returns the ranks of the entries that still have to be run."""
        if not diff.edits:
            return NO_NODES
        self._archive_blocks(diff.removed)
        levels, index = new.levels[diff.inserted], new.index[diff.inserted]
        gists, tokens = levels > 0, levels == 0
        c = self.decoder.config
        shape = (c.n_layers, c.n_kv_heads, len(levels), c.head_dim)
        k_new = torch.zeros(shape, dtype=self.decoder.dtype, device=self.decoder.device)
        v_new = torch.zeros_like(k_new)
        needs_run = tokens.copy()
        if gists.any():
            read = self.reader.read(self.tree, levels[gists], index[gists])
            at = torch.from_numpy(gists.nonzero()[0]).to(k_new.device)
            k_new.index_copy_(2, at, read.k)
            v_new.index_copy_(2, at, read.v)
            needs_run[gists] = read.needs_forward
        size = self.config.block_size
        for block in np.unique(index[tokens] // size) if len(self.archive) else ():
            kept = self.archive.get(int(block))
            rows = (tokens & (index // size == block)).nonzero()[0]
            if kept is not None and len(rows) == size:
                k_new[:, :, rows[0] : rows[-1] + 1], v_new[:, :, rows[0] : rows[-1] + 1] = kept
                needs_run[rows] = False
        plan = SplicePlan.from_edits(
            len(self.entries), diff.edits, capacity=self.cache.capacity, discipline="slots", slots=self.slots.cpu()
        )
        self.cache.splice(plan, k_new, v_new, self.bias_of(new))
        self.entries, self.slots = new, plan.new_slots.to(self.slots.device)
        return diff.inserted[needs_run]

    def _archive_blocks(self, removed: NDArray[np.int64]) -> None:
        size = self.config.block_size
        tokens = removed[self.entries.levels[removed] == 0] if self.archive.capacity else NO_NODES
        for block in np.unique(self.entries.index[tokens] // size):
            ranks = tokens[self.entries.index[tokens] // size == block]
            if len(ranks) == size:
                self.archive.put(int(block), *self.cache.gather(self.slots[torch.from_numpy(ranks)]))

    def assemble(self, expanded: Expanded) -> Relayout:
        """Build the layout from scratch: every token is run on what precedes it."""
        self.clear()
        return self.relayout(expanded, mode="none")

    def run(self, ranks: NDArray[np.int64], *, stop_layer: int | None = None) -> DecoderOutput:
        """One forward over the entries at `ranks` (sorted), in place: their keys and values are written to their
        slots, and each sees the whole context up to its own rank."""
        rank = torch.from_numpy(np.asarray(ranks, np.int64)).to(self.decoder.device)
        store = self.cache.writer(self.slots[rank][None], self.used)
        return self.engine.forward(self.inputs(ranks)[None], rank[None], store, stop_layer=stop_layer)

    def append(self, ids: Sequence[int], *, return_mass: bool = False, logits: bool = False) -> DecoderOutput:
        """Run new tokens at the end of the timeline. The output's mass is by rank: [L, 1, N]. logits: [1, vocab] too.

        Raises BudgetError, before anything changes, if there are not enough free slots, and ValueError for a context
        that does not show all of the history (it was emptied, or what was announced has not run). Whatever else ends
        it early leaves an empty context, as in `relayout`, and the tokens unread.
        """
        stop = self._entries.stop + self._behind
        if stop != self.length:
            raise ValueError(f"context: expected all {self.length} tokens of the history in it, got {stop}; lay it out")
        first, used = self.used, self.used + len(ids)
        if used > self.cache.capacity:
            raise BudgetError(f"budget: the new tokens need {used} slots, the cache has {self.cache.capacity}")
        device = self.decoder.device
        slots = torch.arange(first, used, device=device)  # the used slots are [0, N): new ones follow
        x = self.engine.embed(torch.tensor([list(ids)], dtype=torch.int64, device=device))
        with self._all_or_nothing():
            self.cache.pos[0, first:used] = slots
            store = self.cache.writer(slots[None], used)
            output = self.engine.forward(x, slots[None], store, return_mass=return_mass, logits=logits)
            self.extend(ids)
        if output.mass is None:
            return output
        return replace(output, mass=output.mass[:, :, self.slots])

    def announce(self, ids: Sequence[int]) -> None:
        """Pending tokens that the next `relayout` runs, in one forward with what it opens; `append` has to wait."""
        self.pending += [int(i) for i in ids]

    def extend(self, ids: Sequence[int]) -> None:
        """Record tokens that have just been run into the slots after the used ones."""
        self._behind += len(ids)
        self.pending += [int(i) for i in ids]

    def drop_pending(self) -> None:
        """Forget the pending tokens: they leave the context, and the tree never saw them."""
        count, used = self.entries.stop - self.tree.length, self.used
        self.pending.clear()
        if count <= 0:  # none, or the context is empty
            return
        kept = used - count  # pending tokens are always the last entries
        nothing = self.cache.k[:, 0, :, :0]
        plan = SplicePlan.from_edits(
            used, [Edit(kept, count, 0)], capacity=self.cache.capacity, discipline="slots", slots=self.slots.cpu()
        )
        self.entries = Entries(self.entries.levels[:kept], self.entries.index[:kept], self.config.block_size)
        self.cache.splice(plan, nothing, nothing, self.bias_of(self.entries))
        self.slots = plan.new_slots.to(self.slots.device)

    def _completed_blocks(self, builder: NodeBuilder) -> Nodes | None:
        """Level-1 nodes of the blocks that the pending tokens complete, pooled from the cache. The tokens of an
        incomplete block are always in the context at full detail."""
        size, (first, blocks) = self.config.block_size, self.open_blocks()
        if not blocks:
            return None
        with timed("gist"), torch.no_grad():
            rank = self.used - (self.length - first * size)
            k, v = self.cache.gather(self.slots[rank : rank + blocks * size])
            pooled = builder.net.pool(k.unflatten(2, (blocks, size)), v.unflatten(2, (blocks, size)))
            return Nodes(self.summaries(builder, first, blocks), None, *(x.permute(2, 0, 1, 3) for x in pooled))
