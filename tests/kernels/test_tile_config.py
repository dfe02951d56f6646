"""Matrix tiles that another library of the process has configured on a thread are as it left them after a call."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_kernels import context_attention, fused_linear, gist_encode, lens_score, native
from mc_kernels.context_attention.cases import Case as Attention
from mc_kernels.fused_linear.cases import Case as Linear
from mc_kernels.gist_encode.cases import Case as Encode
from mc_kernels.lens_score.cases import Case as Lens

CXX = shutil.which("c++")
pytestmark = [
    pytest.mark.skipif("amx" not in native.isa_levels(), reason="no matrix tiles"),
    pytest.mark.skipif(CXX is None, reason="needs a C++ compiler"),
]
SOURCE = """
extern "C" void set(const char* c) { __asm__ volatile("ldtilecfg (%0)" ::"r"(c) : "memory"); }
extern "C" void get(char* c) { __asm__ volatile("sttilecfg (%0)" ::"r"(c) : "memory"); }
"""
# Palette 1; two tiles of 7 rows of 48 bytes.
CONFIG = bytes([1] + [0] * 15 + [48, 0, 48, 0] + [0] * 28 + [7, 7] + [0] * 14)


def linear() -> Callable[[], Any]:
    args = Linear("x", 70, 320, 96, norm=True).make(torch.bfloat16)
    return lambda: fused_linear(**args, backend="cpu")


def attention(queries: int) -> Callable[[], Any]:
    args = Attention("x", 4, 2, 64, 300, queries).make(torch.bfloat16)
    return lambda: context_attention(**args, backend="cpu")


def encode() -> Callable[[], Any]:
    blocks, weights = Encode("x", 9, 32, 64, 32, 1, 4, 64).make(torch.bfloat16)
    return lambda: gist_encode(blocks, weights, level=1, backend="cpu")


def lens() -> Callable[[], Any]:
    entries, features, queries, weights, legal = Lens("x", 300, 96, 8, 3, 64, 2, 1, 64, 4, 5, 12).make(torch.bfloat16)
    return lambda: lens_score(entries, features, queries, weights, legal=legal, backend="cpu")


@pytest.mark.parametrize("none", [False, True], ids=["configured", "none"])
def test_tiles_of_others(none: bool, tmp_path: Path) -> None:
    (tmp_path / "tiles.cpp").write_text(SOURCE)
    built = tmp_path / "tiles.so"
    subprocess.run([str(CXX), "-shared", "-fPIC", str(tmp_path / "tiles.cpp"), "-o", str(built)], check=True)
    tiles, config = ctypes.CDLL(str(built)), bytes(64) if none else CONFIG
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for call in (linear(), attention(4), attention(200), encode(), lens()):
            call()  # what is made once, by torch too
            tiles.set(config)
            call()
            found = ctypes.create_string_buffer(64)
            tiles.get(found)
            assert found.raw == config
    finally:
        tiles.set(bytes(64))
        torch.set_num_threads(threads)
