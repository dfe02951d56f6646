"""What LensNet is told of what is wanted now: a few vectors of the newest tokens, the query and the newest gists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .view import FocusView

if TYPE_CHECKING:
    from mc_runtime.layout import Layout

# Rows of the queries: means of so many newest tokens, the query text, the newest gists of levels 1, 2, 3. At most 16.
WINDOWS = (32, 64, 128, 256)
NEWEST_GISTS = (2, 1, 1)
# Longer query text is cut to its end, where a prompt has its question.
QUERY_CHARACTERS = 4096


def newest_queries(view: FocusView, mu: Tensor) -> Tensor:
    """[Q, E] fp32: the queries of a view. mu: see `query_rows`."""
    context = view.context
    stored, newest = context.tree.length, max(WINDOWS)
    ids = context.tree.tokens(max(0, stored - newest)).astype(np.int64).tolist() + context.pending
    asked = view.retrieval.tokenizer.encode(view.query[-QUERY_CHARACTERS:]) if view.query.strip() else []
    gists: list[Tensor] = []
    for level, most in enumerate(NEWEST_GISTS, start=1):
        count = context.tree.count(level)
        gists += context.tree.summaries(level, max(0, count - most), count).to(mu).unbind(0) if count else []
    return query_rows(_embed(context, ids[-newest:]), _embed(context, asked), gists, mu)


def query_rows(newest: Tensor, asked: Tensor, gists: Sequence[Tensor], mu: Tensor) -> Tensor:
    """[Q, E] fp32, see `WINDOWS` and `NEWEST_GISTS`; one row of zeros if there is nothing at all.

    newest: [n, E] fp32 embeddings of the newest tokens, at most max(WINDOWS). asked: those of the query text. gists:
    [E] summaries. mu: [E] mean of the model's embeddings.
    """
    rows: list[Tensor] = []
    if len(newest):
        rows += [newest[-window:].mean(0) - mu for window in WINDOWS]
    if len(asked):
        rows.append(asked.mean(0) - mu)
    rows += list(gists)
    return torch.stack(rows) if rows else torch.zeros_like(mu)[None]


def _embed(context: Layout, ids: Sequence[int]) -> Tensor:
    return context.decoder.embed(torch.tensor([list(ids)], dtype=torch.int64, device=context.decoder.device))[0].float()
