"""The ops on arrays of any library that shares them by DLPack (NumPy, JAX, PyTorch, CuPy, ...).

Arrays in CPU memory go to the CPU's kernels, CuPy's in CUDA memory to the CUDA C++ ones, on CuPy's current stream: the
same native libraries as the ops on torch tensors, and bit for bit their results; torch need not be installed. Arrays
are read where they lie; those that an op ending in an underscore writes have to be writable (JAX's are not). Results
are fresh arrays of the caller's own kind. bf16 is what JAX, torch and ml_dtypes call bfloat16. The arrays of a call lie
on one device; a GPU's of another library are refused, and so are all by `fused_linear` and `signed_score`. No
gradients: `mc_kernels` on torch tensors has them.
"""

from ..splicing import Edit, SplicePlan
from .attention import context_attention
from .linear import fused_linear
from .nets import GistEncodeWeights, LensScoreWeights, gist_encode, lens_score, signed_score
from .pool import GistPoolWeights, collapse_, gist_pool
from .rope import RopeSpec
from .splice import PageTable, kv_splice_

__all__ = [
    "Edit",
    "GistEncodeWeights",
    "GistPoolWeights",
    "LensScoreWeights",
    "PageTable",
    "RopeSpec",
    "SplicePlan",
    "collapse_",
    "context_attention",
    "fused_linear",
    "gist_encode",
    "gist_pool",
    "kv_splice_",
    "lens_score",
    "signed_score",
]
