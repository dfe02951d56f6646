"""Long memories in seconds: a text's tokens, with gists copied from a sample that the model has read.

Reading a million tokens through the model takes minutes, and what a step costs does not depend on what keys and values
say: a memory that is filled so has the size, the files and the timing of one that was ingested, and answers nonsense.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mc_runtime import Session
from mc_runtime.model import LoadedModel
from mc_runtime.nodes import Nodes

# Nodes written at once.
CHUNK = 512


def bytes_per_token(model: LoadedModel, block_size: int) -> float:
    """What a memory takes on disk: keys, values, summary and hidden state of each node, and the token."""
    c, item = model.config, model.decoder.dtype.itemsize
    node = item * (2 * c.n_layers * c.n_kv_heads * c.head_dim + 2 * c.embed_dim)
    return node / (block_size - 1) + 4


def read_sample(directory: Path, model: LoadedModel, ids: NDArray[np.int64]) -> Nodes:
    """The level-1 nodes of `ids`, which are read through the model. Needs at least one block of tokens."""
    with Session.open(directory, model) as session:
        session.ingest(ids, mode="contextual")
        tree = session.tree
        count = tree.count(1)
        if not count:
            raise ValueError(f"ids: expected at least {session.config.block_size} tokens, got {len(ids)}")
        k, v = tree.kv(1, np.arange(count))
        return Nodes(tree.summaries(1).clone(), tree.hidden(1).clone(), k, v)


def fill(
    session: Session, ids: NDArray[np.int64], sample: Nodes, progress: Callable[[int], None] = lambda done: None
) -> None:
    """Append a document of `ids`; its blocks get the nodes of `sample`, again and again. progress: tokens done."""
    if sample.hidden is None or sample.k is None or sample.v is None:
        raise ValueError("sample: expected nodes that the model has read, got fast ones")
    size, tree = session.config.block_size, session.tree
    with tree.begin() as transaction:
        start, stop = transaction.append_tokens(ids)
        first, last = tree.count(1), stop // size
        for i in range(first, last, CHUNK):
            rows = torch.arange(i, min(i + CHUNK, last)) % len(sample)
            nodes = Nodes(sample.summary[rows], sample.hidden[rows], sample.k[rows], sample.v[rows])
            session.builder.push(transaction, nodes)
            progress(min((i + CHUNK) * size, stop) - start)
        transaction.add_document(
            kind="document", title="filled", source=None, start=start, stop=stop, ingest="contextual"
        )
    session.retrieval.update()
