"""Ways into the tree.

`contextual`: the text runs through the model in chunks, each seeing the sink and the tokens before it; blocks become
nodes with pooled keys and values and hidden-state summaries. Memory is bounded by the window.
`fast`: GistNet alone; nodes hold a summary vector, the model never sees the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mc_kernels import Edit, SplicePlan

from .config import MemoryConfig
from .engines import CacheEngine
from .gistnet import GistNet
from .nodes import NodeBuilder, Nodes
from .profiling import timed
from .sources import Source
from .tree import Document, Transaction, Tree

Progress = Callable[[int], None]
Tokens = NDArray[np.int64]
# Blocks per call of GistNet in fast ingest.
FAST_BLOCKS = 512


def ingest_documents(
    tree: Tree,
    builder: NodeBuilder,
    engine: CacheEngine,
    config: MemoryConfig,
    parts: Sequence[tuple[Source, str]],
    *,
    fast: bool,
    progress: Progress | None = None,
    scores: Sequence[float | None] | None = None,
) -> list[Document]:
    """Write documents (text and kind of each, score where it has one) and all their nodes in one transaction: if
    anything fails, tree and builder are as before."""
    stop, written = tree.length, []
    try:
        with tree.begin() as transaction:
            ids = np.concatenate([source.ids for source, _ in parts])
            ingest_tokens(tree, transaction, builder, engine, config, ids, fast=fast, progress=progress)
            for (source, kind), score in zip(parts, scores or [None] * len(parts), strict=True):
                start, stop = stop, stop + len(source.ids)
                document = transaction.add_document(
                    kind=kind,
                    title=source.title,
                    source=source.origin,
                    start=start,
                    stop=stop,
                    ingest="fast" if fast else "contextual",
                    score=score,
                )
                written.append(document)
        return written
    except BaseException:
        builder.reload()
        raise


def ingest_tokens(
    tree: Tree,
    transaction: Transaction,
    builder: NodeBuilder,
    engine: CacheEngine,
    config: MemoryConfig,
    ids: Tokens,
    *,
    fast: bool,
    progress: Progress | None = None,
) -> None:
    """Append tokens, and all nodes that they complete, to an open transaction.

    ids: [n] token ids. progress: called with the number of tokens done so far.
    """
    size, start = config.block_size, tree.length
    transaction.append_tokens(ids)
    # The block that the text begins in may have begun before it: its first tokens are read back from the tree.
    first = start // size * size
    tokens = np.concatenate((tree.tokens(first, start).astype(np.int64), ids))
    tokens = tokens[: len(tokens) // size * size]
    if fast:
        source = fast_nodes(engine, builder.net, tokens.reshape(-1, size))
    else:
        source = contextual_nodes(tree, engine, builder.net, config, first, tokens)
    done = first - start
    with timed("ingest"), torch.inference_mode():
        for nodes in source:
            builder.push(transaction, nodes)
            done += len(nodes) * size
            if progress is not None:
                progress(done)
    if progress is not None:
        progress(len(ids))


def fast_nodes(engine: CacheEngine, net: GistNet, blocks: Tokens) -> Iterator[Nodes]:
    """Nodes of token blocks [N, K] from their embeddings alone."""
    for i in range(0, len(blocks), FAST_BLOCKS):
        ids = torch.from_numpy(blocks[i : i + FAST_BLOCKS]).to(engine.device)
        yield Nodes(net.encode(engine.embed(ids)))


def contextual_nodes(
    tree: Tree, engine: CacheEngine, net: GistNet, config: MemoryConfig, first: int, tokens: Tokens
) -> Iterator[Nodes]:
    """Nodes of whole blocks `tokens`, which stand at `first` in the history, read in its context. None are no work: the
    context is not read either."""
    if not len(tokens):
        return
    size, window = config.block_size, config.ingest_window
    chunk = _Chunks(engine, sink=size, window=window, chunk=config.ingest_chunk)
    if first:
        before = max(size, first - window)
        known = np.concatenate((tree.tokens(0, min(size, first)), tree.tokens(min(before, first), first)))
        for i in range(0, len(known), config.ingest_chunk):
            chunk.run(known[i : i + config.ingest_chunk].astype(np.int64))
    for i in range(0, len(tokens), config.ingest_chunk):
        ids = tokens[i : i + config.ingest_chunk]
        k, v, hidden = chunk.run(ids)
        blocks = len(ids) // size
        with timed("gist"):
            pooled = net.pool(k.unflatten(2, (blocks, size)), v.unflatten(2, (blocks, size)))
            rows = torch.from_numpy(ids.reshape(blocks, size)).to(engine.device)
            summary = net.encode(engine.embed(rows))
            hidden = hidden.float().unflatten(0, (blocks, size)).mean(1)
        yield Nodes(summary, hidden, *(x.permute(2, 0, 1, 3) for x in pooled))


class _Chunks:
    """Runs text chunk by chunk over a sink and a sliding window, in a cache of fixed size. Keys are unrotated, so the
    window slides by dropping entries and renumbering the rest."""

    def __init__(self, engine: CacheEngine, *, sink: int, window: int, chunk: int) -> None:
        self.engine, self.sink, self.window, self.chunk = engine, sink, window, chunk
        self.cache = engine.allocate(sink + window + chunk)
        self.slots = torch.zeros(0, dtype=torch.int64, device=engine.device)

    def run(self, ids: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """ids [n] -> k, v [L, Hkv, n, D] views of the cache (keys unrotated) and the hidden states [n, E] of the
        middle layer; valid until the next call."""
        self._make_room(len(ids))
        device, n = self.engine.device, len(self.slots)
        slots = torch.arange(n, n + len(ids), device=device)
        self.cache.pos[0, slots] = slots
        x = self.engine.embed(torch.from_numpy(ids)[None].to(device))
        writer = self.cache.writer(slots[None], n + len(ids), repeats=len(ids) == self.chunk)
        output = self.engine.forward(x, slots[None], writer, hidden_layer=self.engine.config.n_layers // 2)
        self.slots = torch.cat((self.slots, slots))
        span = slice(n, n + len(ids))
        assert output.tapped is not None
        return self.cache.k[:, 0, :, span], self.cache.v[:, 0, :, span], output.tapped[0]

    def _make_room(self, count: int) -> None:
        drop = len(self.slots) + count - self.cache.capacity
        if drop <= 0:
            return
        plan = SplicePlan.from_edits(
            len(self.slots),
            [Edit(self.sink, drop, 0)],
            capacity=self.cache.capacity,
            discipline="slots",
            slots=self.slots.cpu(),
        )
        nothing = self.cache.k[:, 0, :, :0]
        self.cache.splice(plan, nothing, nothing)
        self.slots = plan.new_slots.to(self.slots.device)
