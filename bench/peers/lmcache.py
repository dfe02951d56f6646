"""LMCache's `rotary_embedding_k_fused`: keys are turned back from their old and on to their new position, in place.

The CUDA extension on a GPU; on a CPU what LMCache itself falls back to, a few lines of torch. Moving the entries is
torch's part: LMCache has no compaction.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..workloads import Candidate, Workload
from ..workloads.kv_splice import KvSplice
from .token_major import TokenMajor, cos_sin_cache

NAME = "LMCache"
FALLBACK = "v1/platform/torch_ops/pos_kernels.py"


def missing(device: torch.device) -> str | None:
    return None if importlib.util.find_spec("lmcache") else "package lmcache is not installed"


@functools.cache
def rotary_embedding_k_fused(device_type: str) -> Callable[..., None]:
    if device_type == "cuda":
        fused: Callable[..., None] = importlib.import_module("lmcache.cuda_ops").rotary_embedding_k_fused
        return fused
    # The file alone: its package's `__init__` imports numba and the kernels of everything else.
    package = importlib.util.find_spec("lmcache")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("lmcache_pos_kernels", Path(package.origin).parent / FALLBACK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain: Callable[..., None] = module.rotary_embedding_k_fused
    return plain


def offers(workload: Workload) -> list[Candidate]:
    if not isinstance(workload, KvSplice) or workload.case.discipline != "ordered" or not workload.case.rope:
        return []
    rotate = rotary_embedding_k_fused(workload.device.type)

    def prepare(inputs: dict[str, Any]) -> SimpleNamespace:
        cache = TokenMajor.of(inputs)
        old, new = (x.repeat(cache.rows) for x in (cache.old, cache.new))
        table = cos_sin_cache(torch.arange(workload.case.capacity), inputs["rope"], workload.dtype)
        return SimpleNamespace(cache=cache, old=old, new=new, table=table.to(workload.device))

    def run(s: SimpleNamespace) -> None:
        size = s.table.shape[-1]
        s.cache.splice(lambda keys: rotate(s.old, s.new, keys, size, s.table, True))

    return [Candidate(NAME, run, prepare, lambda s, _: s.cache.result(workload))]
