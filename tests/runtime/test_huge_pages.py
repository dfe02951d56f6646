"""Tensors in pages of 2 MB: they are tensors like others, and the pages are there."""

from __future__ import annotations

import copy
import io
import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from mc_runtime.huge_pages import ALIGNMENT, LEAST_BYTES, PAGE, HugePages
from mc_runtime.kv_cache import KVCache

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/smaps")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_a_chunk_are_apart(dtype: torch.dtype) -> None:
    memory = HugePages()
    sizes = [(LEAST_BYTES,), (513, 1025), (3, 5, LEAST_BYTES // 8), (7,), ()]
    tensors = [memory.zeros(size, dtype) for size in sizes]
    for number, (x, size) in enumerate(zip(tensors, sizes, strict=True), start=1):
        assert x.shape == size
        assert x.dtype == dtype
        assert x.is_contiguous()
        assert not x.any()
        assert x.data_ptr() % ALIGNMENT == 0
        x.fill_(number)
    for number, x in enumerate(tensors, start=1):
        assert bool((x == number).all())


def test_a_chunk_lives_as_long_as_a_tensor_of_it() -> None:
    memory = HugePages(chunk=4 << 20)
    tensors = [memory.zeros((3 << 20,), torch.uint8) for _ in range(3)]  # each needs a chunk of its own
    assert all(x.data_ptr() % PAGE == 0 for x in tensors)
    del memory
    for number, x in enumerate(tensors, start=1):
        x.fill_(number)
    del tensors[1]
    assert int(tensors[0].sum()) == 3 << 20
    assert int(tensors[1][-1]) == 3


def test_a_copy_takes_one_tensor_along_and_not_its_chunk() -> None:
    memory = HugePages()
    first, second = (memory.zeros((LEAST_BYTES,), torch.uint8) for _ in range(2))
    assert first.untyped_storage().nbytes() == LEAST_BYTES
    file = io.BytesIO()
    torch.save(second, file)
    assert file.tell() < 2 * LEAST_BYTES
    other = copy.deepcopy(second)
    other.fill_(1)
    assert not second.any()


def test_what_is_small_or_elsewhere_comes_from_torch() -> None:
    memory = HugePages()
    assert memory.zeros((LEAST_BYTES,), torch.float32, "meta").device.type == "meta"
    with torch.device("meta"):
        assert memory.zeros((LEAST_BYTES,), torch.float32).device.type == "meta"
    assert memory.zeros((0, 5), torch.float32).shape == (0, 5)
    assert memory._memory is None


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text() or not hasattr(mmap, "MADV_HUGEPAGE"),
    reason="the system gives out no huge pages",
)
def test_the_pages_are_huge() -> None:
    shape = (1, 2, 1, 1, 65536, 64)
    config = replace(tiny_model().config, n_layers=shape[0], n_kv_heads=shape[3], head_dim=shape[5])
    cache = KVCache.allocate(config, shape[4], dtype=torch.bfloat16, device="cpu")
    assert cache.data.shape == shape
    cache.data.fill_(1.0)
    first, last = cache.data.data_ptr(), cache.data.data_ptr() + cache.data.nbytes - 1
    assert cache.data.nbytes == 16 << 20
    inside = huge = 0
    for line in MAPS.read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= first and last < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            huge = int(line.split()[1]) << 10
    assert huge >= cache.data.nbytes // 2
