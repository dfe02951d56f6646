"""Histories beyond what is sensible to read: tokens are all there, K/V of unread blocks are copied from a sample.

Summary vectors are computed from the tokens. Copied keys and values are ones that the model has made of other text of
the same kind, so a reader has to cope with as many gists as in a history that was read, and they are as plausible. What
they say is wrong: figures on such histories speak of finding and reading what was planted, in blocks that are really
read, and not of what gists keep.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.nodes import Nodes

from .base import History, Tokens

# Unread tokens of the history that are read as the sample, at most.
SAMPLE = 4096
# Nodes written at once.
CHUNK = 512


def unread_spans(history: History) -> list[tuple[int, int]]:
    """What lies between the spans that have to be read. Raises InputError if those overlap or are not sorted."""
    if history.read is None:
        return []
    edges, at = [], 0
    for start, stop in history.read:
        if not at <= start < stop <= len(history.ids):
            raise InputError(f"read: expected sorted, disjoint spans of {len(history.ids)} tokens, got {history.read}")
        edges.append((at, start))
        at = stop
    return [(a, b) for a, b in (*edges, (at, len(history.ids))) if a < b]


def read_sample(open_session: Callable[[Path], Session], history: History) -> Nodes:
    """Level-1 nodes [n] of the longest unread span's first `SAMPLE` tokens, read in a memory of their own."""
    start, stop = max(unread_spans(history), key=lambda span: span[1] - span[0])
    with TemporaryDirectory() as scratch, open_session(Path(scratch)) as session:
        session.ingest(history.ids[start : min(stop, start + SAMPLE)], mode="contextual")
        tree = session.tree
        # Without the block that the system prompt ends in.
        first, count = tree.documents()[0].stop // session.config.block_size + 1, tree.count(1)
        if first >= count:
            raise InputError(f"history: expected unread text of several blocks, got {stop - start} tokens")
        k, v = tree.kv(1, np.arange(first, count))
        return Nodes(tree.summaries(1, first, count).clone(), tree.hidden(1, first, count).clone(), k, v)


@torch.inference_mode()
def append_copied(session: Session, ids: Tokens, sample: Nodes) -> None:
    """Append a text whose complete blocks get the keys, values and hidden states of `sample`, again and again."""
    if sample.hidden is None or sample.k is None or sample.v is None:
        raise ValueError("sample: expected nodes that the model has read, got fast ones")
    size, tree, decoder = session.config.block_size, session.tree, session.model.decoder
    before = tree.length // size * size
    tokens = np.concatenate((tree.tokens(before, tree.length).astype(np.int64), ids))
    with tree.begin() as transaction:
        start, stop = transaction.append_tokens(ids)
        first, last = tree.count(1), stop // size
        for i in range(first, last, CHUNK):
            stop_block = min(i + CHUNK, last)
            blocks = torch.from_numpy(tokens[i * size - before : stop_block * size - before].reshape(-1, size))
            rows = torch.arange(i, stop_block) % len(sample)
            summary = session.builder.net.encode(decoder.embed(blocks.to(decoder.device)))
            session.builder.push(transaction, Nodes(summary, sample.hidden[rows], sample.k[rows], sample.v[rows]))
        transaction.add_document(
            kind="document", title="copied gists", source=None, start=start, stop=stop, ingest="contextual"
        )
    session.retrieval.update()
