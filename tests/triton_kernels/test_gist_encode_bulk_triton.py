"""`gist_encode` in Triton, many windows: the kernels whose operands nothing touches on their way."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from mc_kernels import gist_encode
from mc_kernels.gist_encode import triton_kernel, triton_plan
from mc_kernels.gist_encode.cases import Case
from mc_kernels.gist_encode.triton_bulk import bulk_attention_kernel, bulk_residual_kernel, bulk_swiglu_kernel
from mc_kernels.testing import assert_within_error_rule, poisoned_empty

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
from encode_model import make, plain

# Rows that end inside a tile, groups that do not fill theirs, several column tiles.
WIDE = Case("wide", 5, 12, 40, 192, 2, 3, 128, 2)
CLS = Case("cls", 3, 31, 24, 256, 1, 2, 64, 1, "cls", 2)


@pytest.fixture
def bulk(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As with thousands of windows, in small tiles; what is launched."""
    tile = triton_plan.Tile(64, 64, 64, 4, 3)
    launched: list[object] = []
    real = triton_plan.Launch.run
    monkeypatch.setattr(triton_plan.Launch, "run", lambda one: (launched.append(one.kernel), real(one)))
    attention = dataclasses.replace(tile, n=128)
    monkeypatch.setattr(triton_plan, "BULK", triton_plan.BulkTiles(attention, tile, tile, tile))
    monkeypatch.setattr(triton_plan, "SMS", 0)
    return launched


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [WIDE, CLS], ids=lambda case: case.name)
def test_error_rule(case: Case, dtype: torch.dtype, device: str, bulk: list[object]) -> None:
    weights, inputs = make(case, dtype)
    on_device = weights.with_tensors(*(x.to(device) for x in inputs[1:]))
    with poisoned_empty():
        out = gist_encode(inputs[0].to(device), on_device, level=case.level, backend="triton").cpu()
    for kernel, count in ((bulk_attention_kernel, 1), (bulk_residual_kernel, 2), (bulk_swiglu_kernel, 1)):
        assert bulk.count(kernel) == count * case.layers
    exact = plain(case, weights, *(x.double() for x in inputs))
    assert_within_error_rule(out, exact, plain(case, weights, *inputs), what="gists")


def test_in_chunks_beside_nan(device: str, bulk: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits in chunks of windows as together; a window of NaN spoils no other."""
    weights, (blocks, *tensors) = make(WIDE, torch.bfloat16)
    weights = weights.with_tensors(*(x.to(device) for x in tensors))
    together = gist_encode(blocks.to(device), weights, backend="triton").cpu()
    monkeypatch.setattr(triton_kernel, "CHUNK_ROWS", 24)
    blocks[2] = float("nan")
    got = gist_encode(blocks.to(device), weights, backend="triton").cpu()
    others = torch.arange(WIDE.blocks) != 2
    assert got[2].isnan().all()
    assert torch.equal(got[others], together[others])


@pytest.mark.parametrize(
    ("windows", "rows_each", "width", "ffn", "heads", "half", "bulk"),
    [
        (1024, 32, 512, 1792, 8, True, True),
        (1024, 33, 512, 1792, 8, True, True),
        (1024, 32, 512, 1792, 8, False, False),
        (512, 32, 512, 1792, 8, True, False),  # leaves SMs without work
        (1024, 72, 512, 1792, 8, True, False),  # one window in 128 rows
        (1024, 32, 512, 1800, 8, True, False),
        (1024, 32, 384, 1792, 8, True, False),
        (1024, 32, 128, 384, 2, True, False),  # a layer on chip
    ],
)
def test_when(windows: int, rows_each: int, width: int, ffn: int, heads: int, half: bool, bulk: bool) -> None:
    plan = triton_plan.heuristics(windows * rows_each, rows_each, windows, 576, width, ffn, heads, half)
    assert (plan.bulk is not None) == bulk
