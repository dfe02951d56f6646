"""LensNet: what each entry would gain expanded and cost collapsed."""

from .op import lens_score, signed_score
from .weights import LensScoreWeights

__all__ = ["LensScoreWeights", "lens_score", "signed_score"]
