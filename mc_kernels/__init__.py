"""Kernels of MegaContext: gist encoding, focus scoring, and in-place edits of a KV cache.

Each operation is a folder: `ref.py` (plain PyTorch oracle), `op.py` (schema, checks, autograd), `cases.py` (inputs,
bytes and FLOPs, shared by tests and benchmarks).

The ops are loaded, and torch with them, when one is first named; at once where torch is loaded already, so that
`torch.ops.mc` has them. `mc_kernels.array` (the ops on NumPy's, JAX's and others' arrays) and `python -m mc_kernels`
(flags for C and C++) need no torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ops import (
        BackendError,
        Edit,
        GistEncodeWeights,
        GistPoolWeights,
        GistStore,
        LensScoreWeights,
        PageTable,
        RefocusLists,
        RefocusRule,
        RefocusState,
        RopeSpec,
        SplicePlan,
        availability,
        collapse_,
        context_attention,
        for_graphs,
        fused_linear,
        gist_encode,
        gist_pool,
        kv_splice_,
        lens_score,
        refocus_,
        signed_score,
    )

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

# Modules that come with the ops and can be named without an import of their own.
_MODULES = ("checks", "kv_splice", "library", "native", "registry", "rope")


class _Package(ModuleType):
    """A package in which an op's name means the op, although the op's folder is called the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds each submodule to its parent, over whatever has that name.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _load_ops() -> None:
    ops = importlib.import_module(".ops", __name__)
    globals().update({name: getattr(ops, name) for name in __all__})


def __getattr__(name: str) -> Any:
    if name in __all__:
        _load_ops()
        return globals()[name]
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})


if "torch" in sys.modules:
    _load_ops()
