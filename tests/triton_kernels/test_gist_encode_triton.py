"""`gist_encode` in Triton: forward and backward against the oracle, foreign buffers, refusals, compilation."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import BackendError, GistEncodeWeights, gist_encode
from mc_kernels.gist_encode import triton_plan
from mc_kernels.gist_encode.cases import EMPTY, SMALL, Case
from mc_kernels.gist_encode.weights import SHAPES
from mc_kernels.testing import Guarded, assert_within_error_rule, max_error, poisoned_empty

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from allocations import NoAllocation
from encode_model import make, plain

BY_NAME = {case.name: case for case in SMALL}
ONE, GISTS, ODD, MEAN, CLS = (BY_NAME[f"small/{name}"] for name in ("one", "gists", "odd", "mean", "cls"))
# Several tiles of every product, groups of windows that end inside one, heads that fill a tile.
TILES = Case("tiles", 5, 8, 70, 32, 1, 1, 40, 2)
TINY = [dataclasses.replace(case, blocks=2, block_size=3, embed_dim=6, width=4, ffn_dim=3, layers=1)
        for case in (ODD, MEAN, CLS)]  # fmt: skip


def ids(value: Case | torch.dtype) -> str:
    return value.name if isinstance(value, Case) else str(value)


def constants(case: Case, weights: GistEncodeWeights) -> tuple[Any, ...]:
    return (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms)


def call(case: Case, weights: GistEncodeWeights, blocks: Tensor, *tensors: Tensor) -> Tensor:
    return gist_encode(blocks, weights.with_tensors(*tensors), level=case.level, backend="triton")


def to(device: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in tensors)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in (*SMALL, TILES) for dtype in (torch.float32, torch.bfloat16)),
        *((case, torch.float16) for case in (GISTS, ODD, CLS)),
    ],
    ids=ids,
)
def test_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    weights, inputs = make(case, dtype)
    with poisoned_empty():
        out = call(case, weights, *to(device, inputs))
    assert out.dtype == dtype
    assert out.is_contiguous()
    exact = plain(case, weights, *(x.double() for x in inputs))
    assert_within_error_rule(out.cpu(), exact, plain(case, weights, *inputs), what="gists")


ON_CHIP = (GISTS, TILES, CLS, dataclasses.replace(ODD, width=28, name="odd, head of 14"))


def layers_stay_on_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with thousands of windows."""
    monkeypatch.setattr(triton_plan, "SMS", 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
@pytest.mark.parametrize("case", ON_CHIP, ids=ids)
def test_layers_on_chip(case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mc_kernels.gist_encode.triton_layers import layer_kernel

    weights, inputs = make(case, dtype)
    launched = []
    real = triton_plan.Launch.run
    monkeypatch.setattr(triton_plan.Launch, "run", lambda one: (launched.append(one.kernel), real(one)))
    layers_stay_on_chip(monkeypatch)
    with poisoned_empty():
        out = call(case, weights, *to(device, inputs))
    assert launched.count(layer_kernel) == case.layers
    assert len(launched) == case.layers + 4
    exact = plain(case, weights, *(x.double() for x in inputs))
    assert_within_error_rule(out.cpu(), exact, plain(case, weights, *inputs), what="gists")


@pytest.mark.parametrize(
    ("windows", "rows_each", "width", "half", "on_chip"),
    [
        (512, 32, 128, True, True),
        (512, 32, 64, True, True),
        (512, 32, 100, True, True),
        (512, 32, 80, True, False),  # of 128: too much padding
        (512, 32, 256, True, False),
        (64, 32, 128, True, False),  # leaves SMs without work
        (512, 33, 128, True, False),  # one window in 64 rows
        (512, 128, 128, True, False),
        (512, 32, 128, False, False),
    ],
)
def test_which_layers_stay_on_chip(windows: int, rows_each: int, width: int, half: bool, on_chip: bool) -> None:
    plan = triton_plan.heuristics(windows * rows_each, rows_each, windows, 576, width, 3 * width, 2, half)
    assert (plan.layer is not None) == on_chip


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_weights_of_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    blocks, weights = GISTS.make(torch.float32)
    blocks, weights = blocks.to(dtypes[0]), weights.to(dtype=dtypes[1])
    inputs = (blocks, *weights.tensors())
    leaves = [x.requires_grad_() for x in to(device, inputs)]
    out = call(GISTS, weights, *leaves)
    exact = plain(GISTS, weights, *(x.double() for x in inputs))
    assert out.dtype == dtypes[0]
    assert_within_error_rule(out.cpu(), exact, plain(GISTS, weights, *(x.float() for x in inputs)).to(dtypes[0]))
    up = torch.ones_like(out)
    got = torch.autograd.grad(out, leaves, up)
    expected = torch.ops.mc.gist_encode_backward(up, *leaves, *constants(GISTS, weights), "ref")
    for x, g, e in zip(inputs, got, expected, strict=True):
        assert g.dtype == x.dtype
        assert max_error(g, e) <= (1e-5 + 2 * torch.finfo(x.dtype).eps) * float(e.abs().max())


def test_long_windows_on_unaligned_strided_memory(device: str) -> None:
    blocks, weights = dataclasses.replace(ODD, blocks=3, block_size=37).make(torch.float32)
    guard = Guarded(blocks.transpose(0, 1).contiguous(), gap=3)
    view = guard.view.transpose(0, 1) if device == "cpu" else guard.view.to(device).transpose(0, 1)
    expected = gist_encode(blocks, weights, level=2, backend="ref")
    weights = weights.with_tensors(*(Guarded(x, gap=1).view.to(device) for x in weights.tensors()))
    assert max_error(gist_encode(view, weights, level=2, backend="triton"), expected) < 1e-6
    guard.check()
    row = blocks[0].to(device)
    windows = row.as_strided((5, 4, row.shape[1]), (row.shape[1], row.shape[1], 1))  # overlapping
    expected = gist_encode(windows.clone(), weights, backend="triton")
    assert torch.equal(gist_encode(windows, weights, backend="triton"), expected)


def test_untrained_is_the_centred_mean(device: str) -> None:
    blocks, _ = GISTS.make(torch.float32)
    weights = GISTS.untrained()
    expected = gist_encode(blocks.double(), weights.to(dtype=torch.float64), backend="ref")
    out = gist_encode(blocks.to(device), weights.to(device), backend="triton").cpu()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("on_chip", [False, True])
def test_a_window_of_nan_or_zeros_keeps_to_itself(on_chip: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_chip:
        layers_stay_on_chip(monkeypatch)
    case = dataclasses.replace(GISTS, blocks=6, block_size=4)  # four windows in a program of attention
    blocks, weights = case.make(torch.bfloat16, device)
    weights = dataclasses.replace(weights, mu=torch.zeros_like(weights.mu))
    want = gist_encode(blocks, weights, backend="triton")
    blocks[0, 3, 5], blocks[1], blocks[2, 0, 0] = float("nan"), 0.0, float("inf")
    got = gist_encode(blocks, weights, backend="triton")
    assert got[0].isnan().all()
    assert got[1].isfinite().all()
    assert torch.equal(got[3:], want[3:])


def test_foreign_buffers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `out` and `workspace` nothing is allocated, nothing beside them written, and chunks give the same."""
    from mc_kernels.gist_encode import triton_kernel

    weights, inputs = make(TILES, torch.bfloat16)
    inputs = to(device, inputs)
    args = (*inputs, *constants(TILES, weights))
    expected = triton_kernel.gist_encode_triton(*args)
    monkeypatch.setattr(triton_kernel, "CHUNK_ROWS", 3 * TILES.block_size)
    size = triton_kernel.gist_encode_workspace(*args)
    memory = torch.full((size + 512,), 0xA5, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % 256
    out = torch.full((7, *expected.shape[1:]), float("nan"), dtype=expected.dtype, device=device)
    with NoAllocation():
        given = triton_kernel.gist_encode_triton(*args, out=out[1:-1], workspace=memory[start : start + size])
    assert given.data_ptr() == out[1].data_ptr()
    assert max_error(given, expected) <= 2 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    assert out[[0, -1]].isnan().all()
    assert (memory[:start] == 0xA5).all()
    assert (memory[start + size :] == 0xA5).all()
    with pytest.raises(BackendError, match="workspace: expected uint8"):
        triton_kernel.gist_encode_triton(*args, workspace=memory[: size - 1])
    with pytest.raises(BackendError, match="out: expected contiguous"):
        triton_kernel.gist_encode_triton(*args, out=out)


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [(TILES, (torch.bfloat16, torch.bfloat16)), (CLS, (torch.bfloat16, torch.float32)), (MEAN, (torch.float32,) * 2)],
    ids=ids,
)
def test_backward_in_foreign_memory(case: Case, dtypes: tuple[torch.dtype, torch.dtype], device: str) -> None:
    """As above: the same bits, no tensor made, the workspace used to its end and no further."""
    from mc_kernels.gist_encode import triton_backward

    weights, inputs = make(case, torch.float32)
    blocks, *tensors = to(device, inputs)
    args = (blocks.to(dtypes[0]), *(x.to(dtypes[1]) for x in tensors), *constants(case, weights))
    up = torch.randn(case.blocks, case.n_gists, case.embed_dim, generator=torch.Generator().manual_seed(0))
    up = up.to(device, dtypes[0])
    expected = triton_backward.gist_encode_backward_triton(up, *args)
    size = triton_backward.gist_encode_backward_workspace(*args)
    memory = torch.full((size + 512,), 0xFF, dtype=torch.uint8, device=device)  # NaN in every dtype
    start = -memory.data_ptr() % 256
    out = tuple(torch.full_like(x, float("nan")) for x in expected)
    workspace = memory[start : start + size]
    with NoAllocation():
        given = triton_backward.gist_encode_backward_triton(up, *args, out=out, workspace=workspace)
    assert given is out
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (memory[:start] == 0xFF).all()
    assert (memory[start + size :] == 0xFF).all()
    assert not (workspace[-size // 4 :] == 0xFF).all()
    with pytest.raises(BackendError, match="workspace: expected uint8"):
        triton_backward.gist_encode_backward_triton(up, *args, workspace=workspace[:-1])
    with pytest.raises(BackendError, match="out: expected contiguous"):
        triton_backward.gist_encode_backward_triton(up, *args, out=(*out[:-1], out[0]))


def test_refusals(device: str) -> None:
    blocks, weights = CLS.make(torch.float32, device)
    with pytest.raises(BackendError, match="at most 128 rows"):
        gist_encode(blocks.repeat(1, 16, 1), weights, backend="triton")
    wide = dataclasses.replace(MEAN, block_size=100, width=256)
    blocks, weights = wide.make(torch.float32, device)
    with pytest.raises(BackendError, match="got 100 and 128"):
        gist_encode(blocks, weights, backend="triton")
    with pytest.raises(BackendError, match="fp64"):
        gist_encode(blocks[:, :32].double(), weights, backend="triton")


def test_empty(device: str) -> None:
    weights, inputs = make(EMPTY, torch.float32)
    leaves = [x.requires_grad_() for x in to(device, inputs)]
    out = call(EMPTY, weights, *leaves)
    assert out.shape == (0, 2, 24)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, torch.float32) for case in (TILES, ODD, MEAN, CLS, BY_NAME["small/no-layers"])),
        *((case, dtype) for case in (ODD, CLS, BY_NAME["small/K64"]) for dtype in (torch.bfloat16, torch.float16)),
        (BY_NAME["small/K128"], torch.bfloat16),
    ],
    ids=ids,
)
def test_gradients_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    def grads(fn: Any, inputs: tuple[Tensor, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(fn(case, weights, *leaves), leaves, upstream, allow_unused=True)

    # fp32 against fp32 compares two roundings; several draws together make that a comparison of sizes, not of luck.
    drawn: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for seed in range(3 if dtype == torch.float32 else 1):
        weights, inputs = make(case, dtype, seed)
        generator = torch.Generator().manual_seed(seed)
        upstream = torch.randn(case.blocks, case.n_gists, case.embed_dim, generator=generator).to(dtype)
        with poisoned_empty():
            got = grads(call, to(device, inputs), upstream.to(device))
        exact = grads(plain, tuple(x.double() for x in inputs), upstream.double())
        rival = grads(plain, inputs, upstream)
        for name, g, e, r in zip(("blocks", *SHAPES), got, exact, rival, strict=True):
            assert g is not None
            if e is None or r is None or not e.numel():
                assert not g.any()
            else:
                drawn.setdefault(name, []).append((g.cpu(), e, r))
    for name, triples in drawn.items():
        g, e, r = (torch.stack(x) for x in zip(*triples, strict=True))
        assert_within_error_rule(g, e, r, what=f"gradient of {name}")


@pytest.mark.parametrize("case", TINY, ids=ids)
def test_gradients_are_differences(case: Case, device: str) -> None:
    """Central differences of the Triton forward in fp32, along a random direction in every input."""
    weights, inputs = make(case, torch.float32)
    inputs = to(device, inputs)
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(case.blocks, case.n_gists, case.embed_dim, generator=generator).to(device)
    got = torch.ops.mc.gist_encode_backward(up, *inputs, *constants(case, weights), "triton")
    for i, x in enumerate(inputs):
        along = torch.randn(x.shape, generator=generator).to(device)
        step = 3e-3 * float(x.abs().max() / along.abs().max())

        def at(t: float, i: int = i, along: Tensor = along) -> float:
            moved = [*inputs[:i], inputs[i] + t * along, *inputs[i + 1 :]]
            return float((call(case, weights, *moved).double() * up).sum())

        slope, expected = (at(step) - at(-step)) / (2 * step), float((got[i].double() * along).sum())
        norm = float(got[i].double().norm() * along.norm())
        assert abs(slope - expected) <= 5e-3 * norm + 1e-6 / step, ("blocks", *SHAPES)[i]


def test_same_bits_every_time(device: str) -> None:
    weights, inputs = make(TILES, torch.bfloat16)
    runs = []
    for _ in range(2):
        leaves = [x.requires_grad_() for x in to(device, inputs)]
        out = call(TILES, weights, *leaves)
        runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("case", [TINY[0], EMPTY], ids=ids)
def test_opcheck(case: Case, device: str) -> None:
    weights, inputs = make(case, torch.float32)
    rest = (*constants(case, weights), "triton")
    leaves = [x.requires_grad_() for x in to(device, inputs)]
    torch.library.opcheck(torch.ops.mc.gist_encode.default, (*leaves, *rest))
    up = torch.randn(case.blocks, case.n_gists, case.embed_dim, device=device)
    torch.library.opcheck(torch.ops.mc.gist_encode_backward.default, (up, *(x.detach() for x in leaves), *rest))


def test_compile_forward_and_backward(device: str) -> None:
    weights, inputs = make(TINY[0], torch.float32)

    def loss(*tensors: Tensor) -> Tensor:
        return call(TINY[0], weights, *tensors).sin().square().sum()

    leaves = [x.requires_grad_() for x in to(device, inputs)]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert torch.allclose(got, expected)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(a, b)
