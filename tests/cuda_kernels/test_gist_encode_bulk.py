"""`gist_encode` in CUDA C++ for many windows in 16 bits: groups of 128 or 64 rows that stay in shared memory, and tiles
of all rows. On emulated threads the device is made one that takes each of them; a GPU takes what its size and the
shapes say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mc_kernels import GistEncodeWeights, cuda_backend, gist_encode
from mc_kernels.gist_encode import cuda
from mc_kernels.gist_encode.cases import SMALL, Case
from mc_kernels.testing import Guarded, assert_within_error_rule, poison_, poisoned_empty

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from encode_model import make, plain
from splice_model import same_bits

HALVES = (torch.bfloat16, torch.float16)
# Multiprocessors and bytes of shared memory of a device that takes more than 264 rows by groups of 128 rows, of 64, by
# tiles: with too little memory for the larger group, too few groups for so many multiprocessors.
DEVICES = {"128": (3, 227 << 10), "64": (3, 96 << 10), "tiles": (500, 227 << 10)}
SHORT = Case("short", 40, 7, 16, 16, 1, 1, 24)
# Two layers, heads of 8, three gists, tiles that are not full; more than one group for a multiprocessor.
DEEP = Case("deep", 50, 8, 40, 32, 2, 4, 56, 3)
CLS = Case("cls", 13, 31, 40, 48, 1, 3, 72, 1, "cls", 2)
MEAN = Case("mean", 9, 32, 72, 40, 1, 1, 136, 1, "mean", 2)
# Tiles of outputs side by side (as MEAN has of pairs).
WIDE = Case("wide", 9, 32, 264, 272, 0, 17, 40)
NO_LAYERS = Case("no-layers", 40, 8, 24, 16, 0, 1, 24)
CASES = (SHORT, DEEP, CLS, MEAN, NO_LAYERS)
# Windows of which one alone fits a group and leaves half of it empty, one that no group holds, heads of 128: tiles.
FOR_TILES = (
    Case("half-full", 4, 72, 24, 16, 1, 2, 24),
    Case("long", 3, 128, 24, 16, 1, 1, 24, 1, "cls"),
    Case("wide-heads", 34, 8, 24, 256, 1, 2, 40),
)
# Heads of 10 and widths that are no multiples of 8: a launch a stage.
FOR_UNITS = (Case("heads-of-10", 34, 8, 24, 40, 1, 4, 24), Case("odd", 40, 7, 33, 20, 1, 2, 27, 2, "softmax", 2))


@pytest.fixture(autouse=True)
def _device_as_it_was(device: str) -> Iterator[None]:
    yield
    tell(device, "128")


def tell(device: str, way: str, **how: int) -> None:
    """Emulated blocks run as `how`, on a device that takes `way`."""
    if device == "cpu":
        library = cuda_backend.library()
        library.emulate(**{"seed": 0, "threads": 64, "blocks": 3, "fault": 0} | how)
        library.emulate_device(*DEVICES[way])


def flat(blocks: Tensor, weights: GistEncodeWeights, case: Case) -> tuple[Any, ...]:
    constants = (case.level, weights.n_heads, weights.pool, weights.rope_theta, weights.target_rms)
    return (blocks, *weights.tensors(), *constants)


def encode(case: Case, blocks: Tensor, weights: GistEncodeWeights, device: str) -> Tensor:
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    with poisoned_empty():
        return cuda.gist_encode_cuda(*flat(blocks.to(device), weights, case)).cpu()


def check(case: Case, dtype: torch.dtype, device: str) -> None:
    weights, tensors = make(case, dtype)
    want = plain(case, weights, *(x.double() for x in tensors))
    assert_within_error_rule(encode(case, tensors[0], weights, device), want, plain(case, weights, *tensors))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("way", DEVICES)
def test_formula(way: str, case: Case, dtype: torch.dtype, device: str) -> None:
    tell(device, way, seed=len(case.name))
    check(case, dtype, device)


@pytest.mark.parametrize("way", ["128", "tiles"])
def test_tiles_side_by_side(way: str, device: str) -> None:
    tell(device, way)
    check(WIDE, torch.bfloat16, device)


@pytest.mark.parametrize("case", FOR_TILES, ids=lambda c: c.name)
def test_what_does_not_stay_goes_by_tiles(case: Case, device: str) -> None:
    tell(device, "128")
    check(case, torch.bfloat16, device)


@pytest.mark.parametrize("case", FOR_UNITS, ids=lambda c: c.name)
def test_what_is_not_for_tiles(case: Case, device: str) -> None:
    tell(device, "128")
    check(case, torch.float16, device)


def test_the_small_cases_in_numbers(device: str) -> None:
    """The shapes that streaming is tested with, as many times over as makes them bulk."""
    for case in (SMALL[1], SMALL[3], SMALL[4]):
        many = replace(case, blocks=264 // case.block_size + 2)
        tell(device, "128")
        check(many, torch.bfloat16, device)


@pytest.mark.parametrize("way", DEVICES)
def test_every_order_gives_the_same(way: str, device: str) -> None:
    weights, (blocks, *_) = make(SHORT, torch.float16)
    got = []
    for seed in range(3):
        tell(device, way, seed=seed, blocks=seed + 1)
        got.append(encode(SHORT, blocks, weights, device))
    assert same_bits(got[0], got[1])
    assert same_bits(got[0], got[2])


@pytest.mark.parametrize("way", DEVICES)
def test_windows_do_not_see_each_other(way: str, device: str) -> None:
    """The same bits in another place of another group, and beside a window of NaN."""
    tell(device, way)
    weights, (blocks, *_) = make(SHORT, torch.bfloat16)
    got = encode(SHORT, blocks, weights, device)
    assert same_bits(encode(SHORT, blocks.roll(5, 0), weights, device), got.roll(5, 0))
    spoiled = blocks.clone()
    spoiled[16] = float("nan")
    beside = encode(SHORT, spoiled, weights, device)
    assert beside[16].isnan().all()
    others = torch.arange(SHORT.blocks) != 16
    assert same_bits(beside[others], got[others])


@pytest.mark.parametrize("way", DEVICES)
def test_layouts(way: str, device: str) -> None:
    """Blocks between guard bytes and overlapping, weights with wide rows between NaN."""
    tell(device, way)
    weights, tensors = make(SHORT, torch.bfloat16)
    want = encode(SHORT, tensors[0], weights, device)
    guarded = Guarded(tensors[0], gap=8)
    wide = [torch.cat((x, torch.full_like(x, float("nan"))), -1)[..., : x.shape[-1]] for x in tensors[1:-1]]
    strided = weights.with_tensors(*wide, tensors[-1])
    assert same_bits(encode(SHORT, guarded.view, strided, device), want)
    guarded.check()
    stream = tensors[0].flatten(0, 1)
    windows = stream.as_strided((60, 7, stream.shape[1]), (4 * stream.shape[1], stream.shape[1], 1))
    copied = windows.contiguous()
    assert same_bits(encode(SHORT, windows, weights, device), encode(SHORT, copied, weights, device))


@pytest.mark.parametrize("way", DEVICES)
def test_given_memory(way: str, device: str) -> None:
    """Enough on any device, and nothing beyond it is touched; of something wider a view is written, and no more."""
    tell(device, way)
    weights, (blocks, *_) = make(SHORT, torch.bfloat16)
    on_device = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    call = flat(blocks.to(device), on_device, SHORT)
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


def test_the_public_op_takes_many(device: str) -> None:
    tell(device, "128")
    weights, (blocks, *_) = make(SHORT, torch.float16)
    weights = weights.with_tensors(*(x.to(device) for x in weights.tensors()))
    got = gist_encode(blocks.to(device), weights, backend="cuda")
    torch.testing.assert_close(got, gist_encode(blocks.to(device), weights, backend="ref"), atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("way", DEVICES)
def test_a_missing_wait_for_copies_is_noticed(way: str, emulation: Path) -> None:
    """Shared memory is NaN until something arrives."""
    weights, (blocks, *_) = make(SHORT, torch.float16)
    with cuda_backend.emulate(emulation) as library:
        library.emulate_device(*DEVICES[way])
        library.emulate(0, 64, 3, 22)
        try:
            assert encode(SHORT, blocks, weights, "cpu").isnan().any()
        finally:
            library.emulate(0, 0, 1, 0)
            library.emulate_device(*DEVICES["128"])


@pytest.mark.parametrize(
    ("case", "way", "launches"),
    [
        (SHORT, "128", ["bulk", "groups of 128", "tiles", "bulk"]),
        (SHORT, "64", ["bulk", "groups of 64", "tiles", "bulk"]),
        (SHORT, "tiles", ["bulk", "tiles", "tiles", "attention", "tiles", "tiles", "tiles", "bulk", "tiles", "bulk"]),
        (FOR_TILES[0], "128", ["bulk", "tiles", "tiles", "attention", *["tiles"] * 3, "bulk", "tiles", "bulk"]),
        (FOR_UNITS[1], "128", ["bulk"] * 9),
        (replace(SHORT, blocks=37), "128", ["streaming"]),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_which_way_is_taken(case: Case, way: str, launches: list[str], emulation: Path) -> None:
    weights, (blocks, *_) = make(case, torch.float16)
    with cuda_backend.emulate(emulation) as library:
        library.emulate_device(*DEVICES[way])
        library.emulate(0, 64, 3, 0)
        try:
            encode(case, blocks, weights, "cpu")
            assert library.emulate_launches() == "; ".join(f"gist_encode ({name})" for name in launches)
        finally:
            library.emulate(0, 0, 1, 0)
            library.emulate_device(*DEVICES["128"])
