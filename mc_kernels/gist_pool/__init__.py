"""Learned pooling of cached keys and values into gists."""

from .op import gist_pool
from .weights import GistPoolWeights

__all__ = ["GistPoolWeights", "gist_pool"]
