"""Loops that load ahead do not overwrite what the tensor cores still read: see `pipelining`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pipelining import overwritten_tiles

# A tile with two buffers is loaded two iterations ahead, and its product stays pending when the third copy starts.
_LOOP = """
    %tile = ttg.local_alloc : () -> !ttg.memdesc<{buffers}x128x64xbf16, #shared, #smem, mutable>
    %a0 = ttg.memdesc_index %tile[%c0] : !ttg.memdesc<2x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
    %0 = ttg.async_copy_global_to_local %p, %a0 mask %m : tensor<128x64x!tt.ptr<bf16>>
    %a1 = ttg.memdesc_index %tile[%c1] : !ttg.memdesc<2x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
    %1 = ttg.async_copy_global_to_local %p, %a1 mask %m : tensor<128x64x!tt.ptr<bf16>>
    %2:2 = scf.for %i = %c0 to %n step %c1 iter_args(%y = %zero) -> (tensor<64x128xf32, #mma>) : i32 {{
      %a = ttg.memdesc_index %tile[%i] : !ttg.memdesc<2x128x64xbf16> -> !ttg.memdesc<128x64xbf16>
      %t = ttg.memdesc_trans %a {{order = array<i32: 1, 0>}} : !ttg.memdesc<128x64xbf16> -> !ttg.memdesc<64x128xbf16>
      %z = ttng.warp_group_dot %v, %t, %y {{inputPrecision = 0 : i32, isAsync = true}} : tensor<64x128xf32, #mma>
      %w:2 = ttng.warp_group_dot_wait %z, %t {{pendings = {pendings} : i32}} : tensor<64x128xf32, #mma>
    }}
"""


@pytest.mark.parametrize(("buffers", "pendings", "found"), [(2, 1, ["tile"]), (3, 1, []), (2, 0, [])])
def test_what_is_found(buffers: int, pendings: int, found: list[str]) -> None:
    assert overwritten_tiles(_LOOP.format(buffers=buffers, pendings=pendings)) == found


_COMPILE = """
import importlib, sys
from pipelining import overwritten_tiles
from mc_kernels.triton_report import compile_one
import mc_kernels.triton_report as report
kernels = sys.argv[2:]
report._resource_usage = lambda cubin: (0, 0)
import triton
compiled = triton.compile
def keep(*args, **options):
    result = compiled(*args, **options)
    print(result.name, overwritten_tiles(result.asm["ttgir"]), flush=True)
    return result
triton.compile = keep
for one in importlib.import_module(f"mc_kernels.{sys.argv[1]}.triton_kernel").compilations():
    if one.kernel.fn.__name__ in kernels and "float32" not in one.shape:
        compile_one(sys.argv[1], one, 90)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        ("lens_score", ("products", "weighted_sum", "score_entries")),
        ("gist_encode", ("embed_kernel", "attention_kernel", "residual_kernel", "swiglu_kernel", "layer_kernel")),
    ],
    ids=["lens_score", "gist_encode"],
)
def test_no_tile_is_overwritten(op: str, kernels: tuple[str, ...]) -> None:
    """In a process of its own: the interpreter, which this one may have chosen, cannot compile."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", _COMPILE, op, *kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == set(kernels)
    assert all(line.endswith(" []") for line in lines), done.stdout
