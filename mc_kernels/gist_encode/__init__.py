"""GistNet: windows of embeddings to gists."""

from .op import gist_encode
from .weights import GistEncodeWeights

__all__ = ["GistEncodeWeights", "gist_encode"]
