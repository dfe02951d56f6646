"""Each allocation of the native library fails once: every op then says so, has written nothing, and works after."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mc_kernels import native

ROOT = Path(__file__).resolve().parents[2]
CXX = shutil.which("c++")
# The slowest level that has everything, and the best.
LEVELS = [x for x in native.isa_levels() if x in ("amx-emulated", native.isa_levels()[-1])]
pytestmark = [
    pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}"),
    pytest.mark.skipif(CXX is None or sys.platform != "linux", reason="needs a C++ compiler and LD_PRELOAD"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="something else (a sanitizer) is in front of malloc"),
]

# In front of the C++ library: counts what libmc_kernels asks for, of whatever thread, and refuses one of it.
FAULTS = """
#include <dlfcn.h>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

static std::atomic<long> refused{-1}, asked{0};

extern "C" void refuse(long n) { asked = 0, refused = n; }  // the allocation after n others; -1: none
extern "C" long allocations() { return asked; }

static void* take(size_t bytes, size_t line, void* caller) {
    Dl_info where;
    if (refused >= 0 && dladdr(caller, &where) && where.dli_fname && std::strstr(where.dli_fname, "libmc_kernels")) {
        if (asked.fetch_add(1) == refused) throw std::bad_alloc();
    }
    if (void* p = std::aligned_alloc(line, (bytes + line) / line * line)) return p;
    throw std::bad_alloc();
}

void* operator new(size_t n) { return take(n, 16, __builtin_return_address(0)); }
void* operator new[](size_t n) { return take(n, 16, __builtin_return_address(0)); }
void* operator new(size_t n, std::align_val_t a) { return take(n, size_t(a), __builtin_return_address(0)); }
void* operator new[](size_t n, std::align_val_t a) { return take(n, size_t(a), __builtin_return_address(0)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete[](void* p) noexcept { std::free(p); }
void operator delete(void* p, size_t) noexcept { std::free(p); }
void operator delete[](void* p, size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
"""

CALLS = """
import ctypes, sys, torch
from mc_kernels import collapse_, context_attention, fused_linear, gist_encode, gist_pool, kv_splice_, lens_score
from mc_kernels import native
from mc_kernels.context_attention.cases import Case as Attention
from mc_kernels.decoder_layers import CacheSlots, DecoderLayers, LayerWeights
from mc_kernels.fused_linear.cases import Case as Linear
from mc_kernels.gist_encode import cpu as gist_encode_cpu
from mc_kernels.gist_encode.cases import Case as Encode
from mc_kernels.gist_pool.cases import Case as Pool
from mc_kernels.gist_pool.collapse_cases import Case as Collapse
from mc_kernels.kv_splice.cases import Case as Splice
from mc_kernels.lens_score.cases import Case as Lens

BF16, F32 = torch.bfloat16, torch.float32
faults = ctypes.CDLL(None)
torch.set_num_threads(2)
native.use_torch_threads(False)
native.library().set_cpu_isa(sys.argv[1])

def linear(case, dtype=BF16):
    args = case.make(dtype)
    return lambda: fused_linear(**args, backend="cpu"), ()

def attention(case, dtype=BF16):
    args = case.make(dtype)
    return lambda: context_attention(**args, return_mass=True, backend="cpu"), ()

def lens(case, dtype=BF16):
    entries, features, queries, weights, legal = case.make(dtype)
    return lambda: lens_score(entries, features, queries, weights, legal=legal, backend="cpu"), ()

def encode(case, dtype=BF16):
    blocks, weights = case.make(dtype)
    def run():
        gist_encode_cpu._packed._kept.clear()
        return gist_encode(blocks, weights, level=1, backend="cpu")
    return run, ()

def pool(case, dtype=BF16):
    k, v, weights = case.make(dtype)
    return lambda: gist_pool(k, v, weights, backend="cpu"), ()

def layers(E, F, heads, used, dtype=BF16):
    # It may have written when it fails; it writes the same again.
    torch.manual_seed(0)
    def normal(*shape):
        return torch.randn(shape).mul(shape[-1] ** -0.5).to(dtype)
    D = E // heads
    call = DecoderLayers([LayerWeights(normal(E), normal(3 * E, E), None, None, None, normal(E, E), None, normal(E),
                                       normal(2 * F, E), normal(E, F)) for _ in range(2)], eps=1e-5, rope=None)
    k, v, x = normal(2, 1, heads, used, D), normal(2, 1, heads, used, D), normal(1, 1, E)
    cache = CacheSlots(k, v, torch.tensor([[used - 1]]), torch.arange(used)[None])
    return lambda: call(x, torch.tensor([[used - 1]]), cache), ()

def in_place(op):
    def make(case, dtype=BF16):
        args = case.make(dtype)
        return lambda: op(**args, backend="cpu"), (args["k"], args["v"])
    return make

everything = {"norm": True, "bias": True, "swiglu": True, "residual": True}
for name, make, *given in (
    ("linear, stream", linear, Linear("x", 5, 300, 80, **everything), F32),
    ("linear, packed", linear, Linear("x", 3, 256, 64, norm=True, bias=True, bits=4)),
    ("linear, tiles", linear, Linear("x", 70, 300, 80, **everything)),
    ("attention, stream", attention, Attention("x", 4, 2, 64, 300, 2, features=True)),
    ("attention, tiles", attention, Attention("x", 4, 2, 64, 150, 100, features=True)),
    ("attention, tiles of fp32", attention, Attention("x", 2, 1, 20, 250, 200, features=True), F32),
    ("lens", lens, Lens("x", 70, 96, 8, 3, 64, 2, 1, 64, 4, 5, 12)),
    ("lens, odd", lens, Lens("x", 70, 33, 5, 3, 24, 3, 2, 20, 2, 5, 12)),
    ("lens, fp32", lens, Lens("x", 70, 33, 5, 3, 24, 3, 2, 20, 2, 5, 12), F32),
    ("encode", encode, Encode("x", 9, 8, 48, 32, 1, 4, 56)),
    ("encode, few", encode, Encode("x", 2, 32, 192, 128, 1, 4, 192)),
    ("pool", pool, Pool("x", 2, 1, 2, 5, 8, 64, 2)),
    ("collapse", in_place(collapse_), Collapse("x", 2, 1, 64, 100, 2, block_size=8)),
    ("layers", layers, 256, 512, 4, 600),
    ("splice", in_place(kv_splice_), Splice("x", 2, 2, 64, 200, 3, "mixed", theta=1e4)),
):
    run, _ = make(*given)
    want = run()  # tables that calls keep are there from now on
    run, written = make(*given)
    before = [x.clone() for x in written]
    refused = 0
    while True:
        faults.refuse(refused)
        try:
            got = run()
        except MemoryError:
            pass
        asked = faults.allocations()
        faults.refuse(-1)
        if asked <= refused:
            break
        assert all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(written, before)), name
        refused += 1
    if not written:
        one = lambda x: x[0] if isinstance(x, tuple) else x
        assert torch.equal(one(got), one(want)), name
    print(f"{name}: {refused}", flush=True)
"""


@pytest.mark.parametrize("level", LEVELS)
def test_every_allocation_may_fail(level: str, tmp_path: Path) -> None:
    source, faults = tmp_path / "faults.cpp", tmp_path / "libfaults.so"
    source.write_text(FAULTS)
    subprocess.run([str(CXX), "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(faults), "-ldl"], check=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(faults)}
    done = subprocess.run([sys.executable, "-c", CALLS, level], env=env, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = {name: int(n) for name, _, n in (line.rpartition(": ") for line in done.stdout.splitlines())}
    assert len(refused) == 15
    assert all(refused.values()), refused
