"""GPU peers without a GPU: each is run and checked on the CPU with its library's functions replaced.

The replacements have the names and parameters of the real functions and do the same in plain PyTorch, so layouts,
positions and phases are tested here; where the library is installed the parameters are compared with the real ones.
What the real kernels compute is checked where they can run, by the benchmark itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.peers import fla, flash_attn, flashinfer, liger
from bench.workloads import OPS, Candidate, Workload
from bench.workloads.base import PEER_ALLOWANCE
from mc_kernels.context_attention.cases import Case as AttentionCase
from mc_kernels.gist_encode.cases import Case as EncodeCase
from mc_kernels.kv_splice.cases import Case as SpliceCase
from mc_kernels.rope import RopeSpec, phases, rotate

PEERS = (liger, fla, flashinfer, flash_attn)
THETA = 5_000.0
CASES: dict[str, tuple[str, Any]] = {
    "collapse": ("kv_splice_", SpliceCase("collapse", 4, 3, 16, 150, 1, "collapse", theta=THETA)),
    "expand": ("kv_splice_", SpliceCase("expand", 4, 3, 16, 150, 1, "expand", theta=THETA)),
    "mixed": ("kv_splice_", SpliceCase("mixed", 2, 3, 16, 150, 4, "mixed", theta=THETA, span=8)),
    "decode": ("context_attention", AttentionCase("decode", 6, 2, 16, 70, 1, theta=THETA)),
    "prefill": ("context_attention", AttentionCase("prefill", 6, 2, 16, 70, 12, theta=THETA)),
    "encode": ("gist_encode", EncodeCase("encode", 3, 32, 48, 32, 2, 4, 56)),
}
OFFERED = {
    "liger": {"collapse", "expand", "mixed", "encode"},
    "fla": {"collapse", "expand", "mixed", "decode", "encode"},
    "flashinfer": {"collapse", "expand", "mixed", "decode", "prefill"},
    "flash-attn": {"collapse", "expand", "mixed", "decode", "prefill"},
}


def workload(name: str, dtype: torch.dtype = torch.bfloat16) -> Workload:
    op, case = CASES[name]
    return OPS[op](case, dtype, torch.device("cpu"))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [..., n, H, D] rotated by cos, sin [..., n, D/2] in fp32."""
    return rotate(x.float(), cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float(), False).to(x.dtype)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """[B, T, Hq, D] x [B, S, Hkv, D] with a causal mask that ends at the bottom right corner."""
    q, k, v = (x.transpose(1, 2).double() for x in (q, k, v))
    t, s = q.shape[2], k.shape[2]
    mask = torch.ones(t, s, dtype=torch.bool).tril(s - t) if causal else None
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


class LigerRopeFunction:
    @staticmethod
    def apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        half = cos.shape[-1] // 2
        # As the kernel: in place where the [B, T, H, D] form is contiguous, else on a contiguous copy.
        q, k = (x.transpose(1, 2).contiguous() for x in (q, k))
        for x in (q, k):
            x.copy_(turn(x, cos[..., :half], sin[..., :half]))
        return q.transpose(1, 2), k.transpose(1, 2)


class LigerRMSNormFunction:
    @staticmethod
    def apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        return F.rms_norm(X, X.shape[-1:], W, eps)


class LigerFusedGateUpSiLUMulFunction:
    @staticmethod
    def apply(y, in_place=False):
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up


def rotary_embedding(
    x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, chunk_indices=None
):
    assert x.dtype == cos.dtype == sin.dtype
    assert x.dim() == 4
    # The real one works on a contiguous copy where it gets something else: in place that would be lost.
    assert x.is_contiguous() or not inplace
    assert cos.shape[0] >= x.shape[1]
    assert seqlen_offsets == 0
    assert not interleaved
    out = turn(x, cos, sin)
    return x.copy_(out) if inplace else out


def attn_decoding_one_step(
    q, k, v, g=None, scale=None, cu_seqlens=None, do_gate_scale=False, *, window_size=None, sink_bias=None
):
    assert cu_seqlens.tolist() == [0, k.shape[1]]
    assert q.shape[:2] == (1, 1)
    return attend(q, k, v, causal=False).to(v.dtype)


def rms_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def swiglu(x, y):
    return F.silu(x) * y


def apply_rope_with_cos_sin_cache_inplace(positions, query, key, head_size, cos_sin_cache, is_neox=True):
    assert cos_sin_cache.dtype == torch.float32
    assert is_neox
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    for x in (query, key):
        heads = x.view(x.shape[0], -1, head_size)
        heads.copy_(turn(heads, cos, sin))


def _rotary_attention(q, k, v, kv_layout, mode, theta, causal):
    assert (kv_layout, mode) == ("HND", "ROPE_LLAMA")
    inv_freq = RopeSpec.from_theta(theta, q.shape[-1]).inv_freq
    s, t = k.shape[1], q.shape[0]
    cos, sin = phases(torch.arange(s), inv_freq)
    q, k = turn(q, cos[s - t :], sin[s - t :]), turn(k.transpose(0, 1), cos, sin)
    return attend(q[None], k[None], v.transpose(0, 1)[None], causal)[0].to(q.dtype)


def single_decode_with_kv_cache(
    q, k, v, kv_layout="NHD", pos_encoding_mode="NONE", use_tensor_cores=False, q_scale=None, k_scale=None,
    v_scale=None, window_left=-1, logits_soft_cap=None, sm_scale=None, rope_scale=None, rope_theta=None,
    return_lse=False,
):  # fmt: skip
    assert q.dim() == 2
    return _rotary_attention(q[None], k, v, kv_layout, pos_encoding_mode, rope_theta, causal=False)[0]


def single_prefill_with_kv_cache(
    q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None,
    causal=False, kv_layout="NHD", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None,
    window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
    kv_cache_sf=None, k_scale=None, v_scale=None,
):  # fmt: skip
    return _rotary_attention(q, k, v, kv_layout, pos_encoding_mode, rope_theta, causal)


def apply_rotary_emb(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, max_seqlen=None):
    assert x.dim() == 4
    assert cos.shape[0] >= x.shape[1]
    assert not interleaved
    assert not inplace
    return turn(x, cos[: x.shape[1]], sin[: x.shape[1]])


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    return attend(q, k, v, causal).to(q.dtype)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    if k is not None:
        at = slice(cache_seqlens, cache_seqlens + k.shape[1])
        assert not rotary_interleaved
        assert q.dtype == rotary_cos.dtype
        assert at.stop <= k_cache.shape[1]
        q = turn(q, rotary_cos[at], rotary_sin[at])
        k_cache[:, at], v_cache[:, at] = turn(k, rotary_cos[at], rotary_sin[at]), v
        k_cache, v_cache = k_cache[:, : at.stop], v_cache[:, : at.stop]
    return attend(q, k_cache, v_cache, causal).to(q.dtype)


FAKES: dict[str, tuple[Any, ...]] = {
    "liger_kernel": (),
    "liger_kernel.ops": (LigerRopeFunction, LigerRMSNormFunction, LigerFusedGateUpSiLUMulFunction),
    "fla": (),
    "fla.modules": (),
    "fla.modules.rotary": (rotary_embedding,),
    "fla.modules.norm": (),
    "fla.modules.norm.layernorm": (rms_norm,),
    "fla.modules.activations": (swiglu,),
    "fla.ops": (),
    "fla.ops.attn": (),
    "fla.ops.attn.decoding": (attn_decoding_one_step,),
    "flashinfer": (single_decode_with_kv_cache, single_prefill_with_kv_cache),
    "flashinfer.rope": (apply_rope_with_cos_sin_cache_inplace,),
    "flash_attn": (flash_attn_func, flash_attn_with_kvcache),
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": (apply_rotary_emb,),
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, contents in FAKES.items():
        module = ModuleType(name)
        for thing in contents:
            setattr(module, thing.__name__, thing)
        monkeypatch.setitem(sys.modules, name, module)
    liger.kernel.cache_clear()
    yield
    liger.kernel.cache_clear()


def offered(peer: ModuleType, name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Workload, list[Candidate]]:
    task = workload(name, dtype)
    return task, peer.offers(task)


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.NAME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_peer_computes_the_op(peer: ModuleType, name: str, dtype: torch.dtype, fakes: None) -> None:
    task, candidates = offered(peer, name, dtype)
    assert bool(candidates) == (name in OFFERED[peer.NAME])
    for candidate in candidates:
        assert candidate.peer
        assert candidate.name.split()[0] == peer.NAME
        reason = task.check(candidate).reason(PEER_ALLOWANCE)
        assert reason is None, f"{candidate.name}: {reason}"


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.NAME)
@pytest.mark.parametrize("name", CASES)
def test_peer_leaves_what_it_is_given(peer: ModuleType, name: str, fakes: None) -> None:
    """A splice changes the cache and nothing else; the others change nothing."""
    task, candidates = offered(peer, name)
    inputs = task.inputs[0]
    fresh = [inputs["k_new"], inputs["v_new"]] if task.op == "kv_splice_" else []
    if task.op == "context_attention":
        fresh = [inputs[x] for x in ("q", "k", "v")]
    if task.op == "gist_encode":
        fresh = [inputs[0], *inputs[1].tensors()]
    before = [x.clone() for x in fresh]
    for candidate in candidates:
        state = candidate.prepare(inputs)
        for _ in range(2):
            candidate.run(state)
    assert all(torch.equal(x, y) for x, y in zip(fresh, before, strict=True))


@pytest.mark.parametrize("peer", [flashinfer, flash_attn], ids=lambda p: p.NAME)
@pytest.mark.parametrize("name", CASES)
def test_half_precision_only(peer: ModuleType, name: str) -> None:
    assert peer.offers(workload(name, torch.float32)) == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.NAME)
@pytest.mark.parametrize(
    "case",
    [SpliceCase("unrotated", 2, 3, 16, 150, rope=False), SpliceCase("slots", 2, 3, 16, 150, discipline="slots")],
    ids=lambda c: c.name,
)
def test_nothing_to_rotate_no_offer(peer: ModuleType, case: SpliceCase) -> None:
    assert peer.offers(OPS["kv_splice_"](case, torch.bfloat16, torch.device("cpu"))) == []


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: p.NAME)
def test_why_it_is_missing(peer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer.missing(torch.device("cpu")) == "needs a CUDA device"
    monkeypatch.setattr(peer, "find_spec", lambda name: None)
    assert peer.missing(torch.device("cuda")).endswith("is not installed")
    monkeypatch.setattr(peer, "find_spec", lambda name: object())
    assert peer.missing(torch.device("cuda")) is None


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values() if p.name != "ctx"]


@pytest.mark.parametrize(
    ("module", "fake"),
    [(module, fake) for module, contents in FAKES.items() for fake in contents],
    ids=lambda x: x if isinstance(x, str) else x.__name__,
)
def test_replacement_has_the_real_parameters(module: str, fake: Any) -> None:
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module.split('.')[0]} is not installed")
    try:
        real = getattr(importlib.import_module(module), fake.__name__)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{module} cannot be imported here: {error}")
    if fake is swiglu:  # an autograd function's bare `apply`
        real = real.__self__.forward
    elif isinstance(fake, type):
        real, fake = real.forward, fake.apply
    assert _parameters(fake) == _parameters(real)
