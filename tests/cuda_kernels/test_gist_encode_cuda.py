"""`gist_encode` in CUDA C++: the formula, in one launch and in one a stage; layouts, memory, refusals. Groups of
windows that stay in shared memory, and tiles: test_gist_encode_bulk.py."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import BackendError, GistEncodeWeights, cuda_backend, gist_encode
from mc_kernels.gist_encode import cuda
from mc_kernels.gist_encode.cases import EMPTY, SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, poison_, poisoned_empty

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from encode_model import DTYPES, make, plain
from splice_model import same_bits

ONE, GISTS, ODD, MEAN, CLS, NO_LAYERS, K8 = SMALL[:7]
LONG = SMALL[9]
# More rows together than go through in one launch.
BULK = Case("bulk", 40, 7, 16, 8, 1, 1, 8)
BULK_CLS = Case("bulk-cls", 40, 7, 16, 8, 1, 1, 24, 1, "cls", 2)
# name, N, K, E, Eg, layers, heads, F, G, pool, level
WIDE = Case("wide", 2, 9, 1040, 288, 1, 3, 1064, 2)
WIDE_CLS = Case("wide-cls", 1, 32, 40, 144, 2, 2, 48, 1, "cls", 2)
NARROW_HEADS = Case("narrow-heads", 3, 7, 24, 24, 1, 2, 40)
CASES = [case for case in SMALL if case != LONG]


def emulate(device: str, **how: int) -> None:
    """How emulated blocks run."""
    if device == "cpu":
        cuda_backend.library().emulate(**{"seed": 0, "threads": 32, "blocks": 3, "fault": 0} | how)


def exact(case: Case, weights: GistEncodeWeights, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """In fp64, and plainly in the tensors' dtype."""
    return plain(case, weights, *(x.double() for x in tensors)), plain(case, weights, *tensors)


def flat(blocks: Tensor, weights: GistEncodeWeights, case: Case) -> tuple[Any, ...]:
    constants = (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms)
    return (blocks, *weights.tensors(), *constants)


def encode(case: Case, blocks: Tensor, weights: GistEncodeWeights, device: str) -> Tensor:
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    with poisoned_empty():
        return cuda.gist_encode_cuda(*flat(blocks.to(device), weights, case)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_formula(case: Case, dtype: torch.dtype, device: str) -> None:
    emulate(device, seed=len(case.name))
    weights, tensors = make(case, dtype)
    assert_within_error_rule(encode(case, tensors[0], weights, device), *exact(case, weights, tensors))


@pytest.mark.parametrize(
    ("case", "dtype"), [(LONG, torch.float32), (BULK_CLS, torch.float32), (BULK_CLS, torch.bfloat16)], ids=str
)
def test_long_windows_and_many(case: Case, dtype: torch.dtype, device: str) -> None:
    emulate(device)
    weights, tensors = make(case, dtype)
    assert_within_error_rule(encode(case, tensors[0], weights, device), *exact(case, weights, tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [WIDE, WIDE_CLS, NARROW_HEADS], ids=lambda c: c.name)
def test_few_windows_in_16_bits(case: Case, dtype: torch.dtype, device: str) -> None:
    """More inner chunks than weights that are held, several units a block, heads of more than 64 and of odd sizes, a
    final norm that does not begin on 16 bytes."""
    emulate(device, threads=64)
    weights, tensors = make(case, dtype)
    want = exact(case, weights, tensors)
    assert_within_error_rule(encode(case, tensors[0], weights, device), *want)
    norm = weights.final_norm
    off = [torch.cat((x[:1], x))[1:] if x is norm else x for x in weights.tensors()]
    assert_within_error_rule(encode(case, tensors[0], weights.with_tensors(*off), device), *want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_order_gives_the_same(dtype: torch.dtype, device: str) -> None:
    weights, tensors = make(replace(K8, blocks=1), dtype)
    got = []
    for seed in range(3):
        emulate(device, seed=seed, threads=64)
        got.append(encode(K8, tensors[0], weights, device))
    assert same_bits(got[0], got[1])
    assert same_bits(got[0], got[2])


def test_windows_do_not_see_each_other(device: str) -> None:
    """A launch a stage, or all in one: the same bits as alone, beside a window of NaN."""
    emulate(device)
    weights, (blocks, *_) = make(BULK, torch.float32)
    got = encode(BULK, blocks, weights, device)
    alone = encode(BULK, blocks[17:18], weights, device)
    assert same_bits(got[17:18], alone)
    spoiled = blocks.clone()
    spoiled[16] = float("nan")
    beside = encode(BULK, spoiled, weights, device)
    assert beside[16].isnan().all()
    assert same_bits(beside[torch.arange(40) != 16], got[torch.arange(40) != 16])


@pytest.mark.parametrize(("blocks_dtype", "dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_two_dtypes(blocks_dtype: torch.dtype, dtype: torch.dtype, device: str) -> None:
    emulate(device)
    weights, (blocks, *tensors) = make(CLS, dtype)
    blocks = blocks.to(blocks_dtype)
    got = encode(CLS, blocks, weights, device)
    assert got.dtype == blocks_dtype
    want = plain(CLS, weights, blocks.double(), *(x.double() for x in tensors))
    rival = plain(CLS, weights, blocks.float(), *(x.float() for x in tensors)).to(blocks_dtype)
    assert_within_error_rule(got, want, rival)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(dtype: torch.dtype, device: str) -> None:
    """Blocks between guard bytes and overlapping, weights with wide rows."""
    emulate(device)
    weights, tensors = make(GISTS, dtype)
    want = exact(GISTS, weights, tensors)
    guarded = Guarded(tensors[0], gap=5)
    wide = [torch.cat((x, torch.full_like(x, float("nan"))), -1)[..., : x.shape[-1]] for x in tensors[1:-1]]
    strided = weights.with_tensors(*wide, tensors[-1])
    assert_within_error_rule(encode(GISTS, guarded.view, strided, device), *want)
    guarded.check()
    stream = tensors[0].flatten(0, 1)
    windows = stream.as_strided((3, 16, stream.shape[1]), (8 * stream.shape[1], stream.shape[1], 1))
    copied = windows.contiguous()
    assert same_bits(encode(GISTS, windows, weights, device), encode(GISTS, copied, weights, device))


def test_zero_mean_and_empty(device: str) -> None:
    emulate(device)
    weights, (blocks, *_) = make(K8, torch.float16)
    case = replace(K8, level=2)
    centred = torch.cat((blocks[:, :4], -blocks[:, :4]), 1)
    assert encode(case, centred, weights, device).isfinite().all()
    weights, (none, *_) = make(EMPTY, torch.float16)
    assert encode(EMPTY, none, weights, device).shape == (0, 2, 24)


@pytest.mark.parametrize("case", [GISTS, BULK], ids=lambda c: c.name)
def test_given_memory(case: Case, device: str) -> None:
    emulate(device)
    weights, (blocks, *_) = make(case, torch.bfloat16)
    on_device = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    call = flat(blocks.to(device), on_device, case)
    want = cuda.gist_encode_cuda(*call)
    need = cuda.gist_encode_workspace(*call)
    space = torch.full((need + 64,), 255, dtype=torch.uint8, device=device)
    wide = torch.zeros(*want.shape[:2], 2 * want.shape[2], dtype=want.dtype, device=device)
    out = poison_(wide[..., : want.shape[2]])
    assert cuda.gist_encode_cuda(*call, out=out, workspace=space[:need]) is out
    assert same_bits(out.cpu(), want.cpu())
    assert (wide[..., want.shape[2] :] == 0).all()
    assert (space[need:] == 255).all()
    with pytest.raises(ValueError, match=f"workspace: expected {need} bytes on a multiple of 16, got {need - 8}"):
        cuda.gist_encode_cuda(*call, workspace=space[: need - 8])
    with pytest.raises(ValueError, match="out: expected shape"):
        cuda.gist_encode_cuda(*call, out=out[:, :, 1:])
    with pytest.raises(TypeError, match="out: expected dtype"):
        cuda.gist_encode_cuda(*call, out=out.float())


def test_refusals(device: str) -> None:
    emulate(device)
    weights, (blocks, *_) = make(K8, torch.float32)
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    # A head of 256.
    wide = Case("wide", 1, 2, 8, 256, 1, 1, 8)
    wide_weights, (few, *_) = make(wide, torch.float32)
    wide_weights = wide_weights.with_tensors(*(x.to(device) for x in wide_weights.tensors()))
    with pytest.raises(BackendError, match="heads of at most 128, got 256"):
        gist_encode(few.to(device), wide_weights, backend="cuda")
    double = weights.with_tensors(*(x.double() for x in weights.tensors()))
    with pytest.raises(BackendError, match="fp64 is for the oracle"):
        gist_encode(blocks.to(device).double(), double, backend="cuda")


def test_gradients_are_those_of_others(device: str) -> None:
    emulate(device)
    weights, (blocks, *_) = make(K8, torch.float32)
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    grads = []
    for backend in ("cuda", "ref"):
        leaf = blocks.to(device, copy=True).requires_grad_(True)
        gist_encode(leaf, weights, backend=backend).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_opcheck(device: str) -> None:
    emulate(device)
    weights, (blocks, *_) = make(K8, torch.float32)
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    torch.library.opcheck(torch.ops.mc.gist_encode.default, (*flat(blocks.to(device), weights, K8), "cuda"))


@pytest.mark.parametrize("seed", range(2))
def test_a_missing_barrier_of_all_blocks_is_noticed(seed: int, emulation: Path) -> None:
    weights, (blocks, *_) = make(K8, torch.float16)
    with cuda_backend.emulate(emulation) as library:
        library.emulate(seed, 32, 3, 21)
        try:
            with pytest.raises(RuntimeError, match=r"gist_encode \(streaming\): .* of workspace races with thread"):
                gist_encode(blocks, weights, backend="cuda")
        finally:
            library.emulate(0, 0, 1, 0)


@pytest.mark.gpu
def test_a_graph_replays_it() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    weights, (blocks, *_) = make(GISTS, torch.bfloat16)
    weights = weights.with_tensors(*(x.cuda() for x in weights.tensors()))
    call = flat(blocks.cuda(), weights, GISTS)
    want = cuda.gist_encode_cuda(*call).clone()
    workspace = torch.empty(cuda.gist_encode_workspace(*call), dtype=torch.uint8, device="cuda")
    out = torch.empty_like(want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cuda.gist_encode_cuda(*call, out=out, workspace=workspace)
    for _ in range(2):
        poison_(out)
        graph.replay()
        torch.cuda.synchronize()
        assert same_bits(out.cpu(), want.cpu())
