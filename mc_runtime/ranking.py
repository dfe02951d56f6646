"""How well passages match a query: what BM25 over single blocks finds is put in order by what stands around it.

BM25 knows neither the order of words nor what the neighbours of a block say: among facts of one pattern ("the number
for red-fox is 7") a block that has one of the words and the other from the next fact scores as high as the right one.
For a block b, with the query's words w, each once, and idf(w) their weight:

    score(b) = (BM25(b) + BM25(blocks around b) / 2 + 3/8 nearness(b)) * (1 + found(b)) / 2

found is the share of the sum of idf(w) that stands in b and around it; nearness is that of Rasolofo & Savoy (2003,
"Term Proximity Scoring for Keyword-Based Retrieval Systems"): the sum over pairs of the query's words of
min(idf) * (k1 + 1) t / (k1 + t), where t adds up 1 / distance^2 over the places at which the two stand at most five
words apart, half where their order is another than the query's. The weights were chosen on SQuAD's training articles
(docs/quality.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from .segments import SegmentedBM25

# What counts as around a block, either side of it; at least one block.
AROUND_TOKENS = 64
AROUND_SHARE = 0.5
NEARNESS_SHARE = 0.375
# Words that are farther apart say nothing about each other.
NEAR_WORDS = 5
OTHER_ORDER = 0.5


def nearness(words: Sequence[str], asked: Mapping[str, tuple[int, float]], k1: float) -> float:
    """Of a text of `words`. asked: by word of the query, its place there and its weight."""
    places = [(at, *asked[word]) for at, word in enumerate(words) if word in asked]
    close: defaultdict[tuple[int, int], float] = defaultdict(float)
    weights = {}
    for i, (at, place, weight) in enumerate(places):
        for other_at, other_place, other_weight in places[i + 1 :]:
            distance = other_at - at
            if distance > NEAR_WORDS:
                break
            if place != other_place:
                pair = (min(place, other_place), max(place, other_place))
                close[pair] += (1.0 if place < other_place else OTHER_ORDER) / distance**2
                weights[pair] = min(weight, other_weight)
    return sum(weights[pair] * (k1 + 1) * t / (k1 + t) for pair, t in close.items())


def rank_blocks(
    index: SegmentedBM25,
    query: Sequence[str],
    blocks: NDArray[np.int64],
    texts: Sequence[Sequence[str]],
    weight: NDArray[np.float64],
    around: int,
) -> NDArray[np.float64]:
    """[n]: scores of `blocks` [n], which ascend.

    query: words, of which each counts once; texts: those of each block. weight [m]: what the words of each of the first
    m blocks of the index count around others; behind those nothing counts. around: blocks either side.
    """
    words = list(dict.fromkeys(query))
    idf = index.weights(words)
    if not idf.any() or not len(blocks):
        return np.zeros(len(blocks))
    near = blocks[:, None] + np.arange(-around, around + 1)
    inside = (near >= 0) & (near < len(weight))
    known, back = np.unique(np.where(inside, near, 0), return_inverse=True)
    back = back.reshape(near.shape)
    counts = index.counts(words, known).astype(np.float64)
    lengths = index.lengths(known).astype(np.float64)
    mean = index.mean_length()
    shares = np.where(inside, weight[np.where(inside, near, 0)], 0.0)
    shares[:, around] = 1.0  # the block itself
    own = _bm25(index, idf, counts[:, back[:, around]], lengths[back[:, around]], mean)
    whole = (counts[:, back] * shares).sum(2)  # [q, n]
    wide = _bm25(index, idf, whole, (lengths[back] * inside).sum(1), mean * near.shape[1])
    asked = {word: (place, weight) for place, (word, weight) in enumerate(zip(words, idf.tolist(), strict=True))}
    close = np.array([nearness(text, asked, index.k1) for text in texts])
    found = idf @ (whole > 0) / idf.sum()
    scores: NDArray[np.float64] = (own + AROUND_SHARE * wide + NEARNESS_SHARE * close) * (1 + found) / 2
    return scores


def _bm25(
    index: SegmentedBM25,
    idf: NDArray[np.float64],
    counts: NDArray[np.float64],
    length: NDArray[np.float64],
    mean: float,
) -> NDArray[np.float64]:
    """[n] from counts [q, n] and lengths [n] of texts that have `mean` words on average."""
    scores: NDArray[np.float64] = idf @ (counts / (index.norm(length, mean) + counts))
    return scores
