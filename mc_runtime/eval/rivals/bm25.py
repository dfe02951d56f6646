"""BM25 append (RAG): the chunks of the far text that match the recent tokens best, run again as a prompt.

Okapi BM25 (Robertson & Zaragoza 2009) by the library `bm25s`, k1 1.5, b 0.75, English stop words and stems; chunks of
128 tokens. The budget is filled: chunks best first, the last one cut to what is left, then put in the text's order
behind the sink. Chunks that match nothing come last, the latest first.
"""

from __future__ import annotations

import bm25s
import numpy as np
import Stemmer
import torch
from torch import Tensor

from mc_runtime.model.tokenizer import Tokenizer
from mc_runtime.retrieval import K1, B

from ..pasts import Past, hidden_behind


def chunk_scores(texts: list[str], query: str) -> np.ndarray:
    """BM25 of every text, [texts] float64; zeros where no word of the query is in any of them."""
    stemmer = Stemmer.Stemmer("english")

    def stems(x: list[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            x, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )
        return found

    corpus, asked = stems(texts), stems([query])[0]
    if not asked or not any(corpus):
        return np.zeros(len(texts))
    index = bm25s.BM25(k1=K1, b=B)
    index.index(corpus, show_progress=False)
    known = [word for word in asked if word in index.vocab_dict]
    return np.asarray(index.get_scores(known), np.float64) if known else np.zeros(len(texts))


class BM25Append:
    """chunk: tokens per chunk. The query is as long as the recent tokens."""

    ours, anew = False, False

    def __init__(self, tokenizer: Tokenizer, chunk: int = 128) -> None:
        self.tokenizer, self.chunk = tokenizer, chunk
        self.name = "BM25 append (RAG)" if chunk == 128 else f"BM25, {chunk}-token chunks"

    def choose(self, past: Past, slots: int, asked: Tensor) -> Tensor:
        """Places of the far tokens to append for the queries `asked [B, T]` (token ids), [B, S] ascending."""
        slots = min(slots, past.far - 1)
        bounds = [(i, min(i + self.chunk, past.far)) for i in range(0, past.far, self.chunk)]
        rows = []
        for ids, query in zip(past.ids[:, : past.far].tolist(), asked.tolist(), strict=True):
            texts = [self.tokenizer.decode(ids[start:stop]) for start, stop in bounds]
            scores = chunk_scores(texts, self.tokenizer.decode(query))
            order = np.lexsort((-np.arange(len(bounds)), -scores))
            places = np.concatenate([np.arange(*bounds[i]) for i in order])
            rows.append(np.sort(places[places > 0][:slots]))  # the first token is there already
        return torch.from_numpy(np.stack(rows)).to(past.ids.device)

    def follow(self, past: Past, slots: int, packed: bool) -> Tensor:
        recent = past.ids[:, past.far : past.far + past.recent]
        return self.behind(past, self.choose(past, slots, recent), past.follow, packed)

    def behind(self, past: Past, places: Tensor, follow: Tensor, packed: bool) -> Tensor:
        """Hidden states of `follow [B, T]` after the sink and the far tokens at `places [B, S]`."""
        rows = past.decoder.embed(past.ids.gather(1, places))
        return hidden_behind(past, rows, places, packed=packed, follow=follow)
