"""What training does about memory that is freed and asked for again."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from mc_runtime.train.freed_memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20 << 20)  # 80 MB, more than the allocator keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


RESIDENT = """
import torch
from mc_runtime.train.freed_memory import give_back_freed_memory, keep_freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

assert keep_freed_memory()
kept = []
for _ in range(8):  # what stays keeps the heap from shrinking at its end
    torch.ones(20 << 20)
    kept.append(torch.ones(20 << 20)[:1000].clone())
    x = torch.ones(10 << 20)
kept.append(torch.ones(1 << 20))
del x
before = resident()
give_back_freed_memory()
print(before - resident(), (20 << 20) * 4 // 4096)
"""


def faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_memory_is_kept_for_the_next_step() -> None:
    # Ten times the block's pages, against at most once: where the heap grows a last time.
    assert 4 * faults("keep") < faults("leave")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_kept_memory_is_given_back() -> None:
    """Also from the middle of a heap whose end is in use."""
    run = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    less, of_a_block = map(int, run.stdout.split())
    assert less > 0.9 * of_a_block
