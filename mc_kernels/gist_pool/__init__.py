"""Learned pooling of cached keys and values into gists, on its own and as an edit of the cache."""

from .collapse import collapse_
from .op import gist_pool
from .weights import GistPoolWeights

__all__ = ["GistPoolWeights", "collapse_", "gist_pool"]
