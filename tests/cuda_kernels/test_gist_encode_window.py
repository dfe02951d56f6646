"""`gist_encode` in CUDA C++, one window of up to 32 rows and a net that the multiprocessors hold in shared memory."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from encode_model import make
from test_gist_encode_cuda import emulate, encode, exact, same_bits

from mc_kernels.gist_encode.cases import Case
from mc_kernels.testing import assert_within_error_rule

# name, N, K, E, Eg, layers, heads, F, G, pool, level
PLAIN = Case("plain", 1, 32, 96, 64, 2, 2, 160)
CASES = [
    PLAIN,
    Case("two windows and gists", 2, 11, 64, 96, 1, 3, 64, 3, "softmax", 2),
    Case("class tokens", 3, 7, 32, 128, 1, 2, 96, 1, "cls", 3),
    Case("mean", 1, 1, 64, 64, 2, 4, 32, 1, "mean"),
    Case("no layers", 1, 5, 32, 32, 0, 1, 32),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_error_rule(case: Case, dtype: torch.dtype, device: str) -> None:
    """One warp a block and several, blocks with several units of a stage."""
    weights, tensors = make(case, dtype)
    want = exact(case, weights, tensors)
    for threads in (32, 128) if device == "cpu" else (0,):
        emulate(device, seed=threads, threads=threads)
        assert_within_error_rule(encode(case, tensors[0], weights, device), *want)


def test_every_order_gives_the_same(device: str) -> None:
    weights, tensors = make(PLAIN, torch.float16)
    got = []
    for seed in range(3):
        emulate(device, seed=seed, threads=64)
        got.append(encode(PLAIN, tensors[0], weights, device))
    assert same_bits(got[0], got[1])
    assert same_bits(got[0], got[2])


def test_a_window_of_nan_spoils_no_other(device: str) -> None:
    case = replace(CASES[1], blocks=2)
    emulate(device, threads=64)
    weights, (blocks, *_) = make(case, torch.bfloat16)
    got = encode(case, blocks, weights, device)
    blocks[1] = float("nan")
    beside = encode(case, blocks, weights, device)
    assert same_bits(beside[0], got[0])
    assert beside[1].isnan().all()
