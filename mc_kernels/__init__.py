"""Kernels of MegaContext: gist encoding, focus scoring, and in-place edits of a KV cache.

Each operation is a folder: `ref.py` (plain PyTorch oracle), `op.py` (schema, checks, autograd), `cases.py` (inputs,
bytes and FLOPs, shared by tests and benchmarks).
"""

from .context_attention import context_attention
from .fused_linear import fused_linear
from .gist_encode import GistEncodeWeights, gist_encode
from .gist_pool import GistPoolWeights, collapse_, gist_pool
from .kv_splice import Edit, PageTable, SplicePlan, kv_splice_
from .lens_score import LensScoreWeights, lens_score, signed_score
from .registry import BackendError, availability
from .rope import RopeSpec

__all__ = [
    "BackendError",
    "Edit",
    "GistEncodeWeights",
    "GistPoolWeights",
    "LensScoreWeights",
    "PageTable",
    "RopeSpec",
    "SplicePlan",
    "availability",
    "collapse_",
    "context_attention",
    "fused_linear",
    "gist_encode",
    "gist_pool",
    "kv_splice_",
    "lens_score",
    "signed_score",
]
