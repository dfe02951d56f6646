"""The ops as the benchmark sees them: one workload class an op, its cases, and the choice of cases of a plain run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mc_kernels.context_attention.cases import CASES as CONTEXT_ATTENTION
from mc_kernels.fused_linear.cases import CASES as FUSED_LINEAR
from mc_kernels.gist_encode.cases import CASES as GIST_ENCODE
from mc_kernels.gist_pool.cases import CASES as GIST_POOL
from mc_kernels.gist_pool.collapse_cases import CASES as COLLAPSE
from mc_kernels.kv_splice.cases import CASES as KV_SPLICE
from mc_kernels.lens_score.cases import CASES as LENS_SCORE
from mc_kernels.refocus.timed_cases import CASES as REFOCUS

from .base import Candidate, Check, Workload
from .collapse import Collapse
from .context_attention import ContextAttention
from .fused_linear import FusedLinear
from .gist_encode import GistEncode
from .gist_pool import GistPool
from .kv_splice import KvSplice
from .lens_score import LensScore
from .refocus import Refocus

__all__ = ["CASES", "OPS", "Candidate", "Check", "Workload", "choose"]

OPS: dict[str, type[Workload]] = {
    w.op: w for w in (KvSplice, ContextAttention, FusedLinear, GistPool, Collapse, GistEncode, LensScore, Refocus)
}
CASES: dict[str, Sequence[Any]] = {
    "kv_splice_": KV_SPLICE,
    "context_attention": CONTEXT_ATTENTION,
    "fused_linear": FUSED_LINEAR,
    "gist_pool": GIST_POOL,
    "collapse_": COLLAPSE,
    "gist_encode": GIST_ENCODE,
    "lens_score": LENS_SCORE,
    "refocus_": REFOCUS,
}
# What runs without --shape: every op, every model, short and long, within five minutes on two cores.
HEADLINE = {
    "kv_splice_": (
        "SmolLM2-135M/8k/ordered-rope/1-collapse",
        "SmolLM2-135M/8k/ordered-rope/8-mixed",
        "SmolLM2-135M/2k/ordered-rope/1-collapse",
        "SmolLM2-135M/8k/slots/8-mixed",
        "SmolLM2-135M/32k/slots/8-mixed",
        "Llama-3.2-1B/8k/ordered/1-expand",
        "Llama-3-8B/2k/ordered-rope/1-collapse",
    ),
    "context_attention": (
        "SmolLM2-135M/8k/decode",
        "SmolLM2-135M/2k/decode",
        "SmolLM2-135M/32k/decode",
        "SmolLM2-135M/2k/prefill512",
        "Llama-3.2-1B/8k/decode",
        "Llama-3-8B/8k/decode",
        "Llama-3-8B/32k/decode",
    ),
    "fused_linear": (
        "SmolLM2-135M/rows1/gate-up",
        "SmolLM2-135M/rows1/head",
        "SmolLM2-135M/rows8/gate-up",
        "Llama-3.2-1B/rows1/gate-up",
        "SmolLM2-135M/rows1/gate-up-4-bit",
        "SmolLM2-135M/rows1/head-8-bit",
        "Llama-3.2-1B/rows1/gate-up-4-bit",
    ),
    "gist_pool": ("SmolLM2-135M/N1", "SmolLM2-135M/N256", "Llama-3.2-1B/N1", "Llama-3-8B/N1"),
    "collapse_": ("SmolLM2-135M/2k/1-last", "SmolLM2-135M/2k/8", "Llama-3-8B/2k/1-last"),
    "gist_encode": ("SmolLM2-135M/N1", "SmolLM2-135M/N64", "Llama-3.2-1B/N8", "Llama-3-8B/N8"),
    "lens_score": ("SmolLM2-135M/N2k", "SmolLM2-135M/N8k", "SmolLM2-135M/N32k", "Llama-3-8B/N8k"),
    "refocus_": ("SmolLM2-135M/2k/4-open-8-close", "SmolLM2-135M/8k/4-open-8-close"),
}
QUICK = {
    "kv_splice_": ("SmolLM2-135M/2k/ordered-rope/1-collapse", "SmolLM2-135M/8k/slots/8-mixed"),
    "context_attention": ("SmolLM2-135M/2k/decode", "SmolLM2-135M/8k/decode"),
    "fused_linear": ("SmolLM2-135M/rows1/gate-up",),
    "gist_pool": ("SmolLM2-135M/N1",),
    "collapse_": ("SmolLM2-135M/2k/1-last",),
    "gist_encode": ("SmolLM2-135M/N1",),
    "lens_score": ("SmolLM2-135M/N2k",),
    "refocus_": ("SmolLM2-135M/2k/4-open-8-close",),
}


def choose(ops: Sequence[str] = (), shapes: Sequence[str] = (), quick: bool = False) -> list[tuple[str, Any]]:
    """(op, case) pairs: the headline ones, or with `shapes` every case whose name contains one of them.

    Raises ValueError if an op is unknown or nothing is left.
    """
    named = [name if name in OPS else f"{name}_" for name in ops] or list(OPS)
    for name in named:
        if name not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {name.removesuffix('_')!r}")
    listed = QUICK if quick else HEADLINE
    chosen: list[tuple[str, Any]] = []
    for op in named:
        if shapes:
            chosen += [(op, c) for c in CASES[op] if any(s.lower() in c.name.lower() for s in shapes)]
        else:
            by_name = {c.name: c for c in CASES[op]}
            chosen += [(op, by_name[name]) for name in listed[op]]
    if not chosen:
        raise ValueError(f"shape: no case of {', '.join(named)} has a name with any of {', '.join(shapes)}")
    return chosen
