"""The ops on torch tensors, all of them registered: what `mc_kernels` loads when one is first used."""

from .context_attention import context_attention
from .fused_linear import fused_linear
from .gist_encode import GistEncodeWeights, gist_encode
from .gist_pool import GistPoolWeights, collapse_, gist_pool
from .kv_splice import PageTable, SplicePlan, kv_splice_
from .lens_score import LensScoreWeights, lens_score, signed_score
from .preference import for_graphs
from .refocus import GistStore, RefocusLists, RefocusRule, RefocusState, refocus_
from .registry import BackendError, availability
from .rope import RopeSpec
from .splicing import Edit

__all__ = [
    "BackendError",
    "Edit",
    "GistEncodeWeights",
    "GistPoolWeights",
    "GistStore",
    "LensScoreWeights",
    "PageTable",
    "RefocusLists",
    "RefocusRule",
    "RefocusState",
    "RopeSpec",
    "SplicePlan",
    "availability",
    "collapse_",
    "context_attention",
    "for_graphs",
    "fused_linear",
    "gist_encode",
    "gist_pool",
    "kv_splice_",
    "lens_score",
    "refocus_",
    "signed_score",
]
