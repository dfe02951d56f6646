"""Compile the Triton kernels ahead of time, without a GPU: registers, spills and shared memory of every configuration.

    python -m mc_kernels.triton_report --out docs/triton_resources.md

Each `mc_kernels/<op>/triton_kernel.py` lists, in `compilations()`, what its host code may launch for the shapes of
SmolLM2-135M and Llama-3-8B. A configuration that spills registers or needs more shared memory than the GPU has is an
error: exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .triton_assembler import use_sound_assembler

OPS = ("gist_pool", "kv_splice", "context_attention", "lens_score", "gist_encode")
CAPABILITIES = (80, 90, 100)
# Shared memory that one block may use, bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclass(frozen=True)
class Compilation:
    """One specialisation of one kernel.

    shape: what it is for, as "SmolLM2-135M". signature: argument name to Triton type ("*bf16", "i32", "i64", "fp32"),
    constexprs to "constexpr". constexprs: their values (None for an argument that is not given). aligned: names of the
    arguments that are multiples of 16, as Triton specialises pointers of torch's allocator. most_registers: that a
    thread may have. capabilities: where it is launched; empty: everywhere.
    """

    shape: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int = 3
    aligned: Sequence[str] = field(default=())
    most_registers: int | None = None
    capabilities: Sequence[int] = ()


@dataclass(frozen=True)
class Resources:
    """What one specialisation takes on one architecture; registers and local bytes (spills, stack) per thread."""

    op: str
    kernel: str
    shape: str
    configuration: str
    capability: int
    registers: int
    local_bytes: int
    shared_bytes: int

    @property
    def problem(self) -> str | None:
        if self.local_bytes:
            return f"{self.local_bytes} bytes of registers spilled per thread"
        limit = SHARED_LIMIT[self.capability]
        return f"{self.shared_bytes} bytes of shared memory, limit {limit}" if self.shared_bytes > limit else None


def compile_one(op: str, one: Compilation, capability: int) -> Resources:
    """Compile for sm_<capability> and read the resource usage of the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    use_sound_assembler()
    names = one.kernel.arg_names
    signature = {name: one.signature[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in one.aligned}
    constexprs = {(names.index(name),): value for name, value in one.constexprs.items()}
    source = ASTSource(fn=one.kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    options = {"num_warps": one.num_warps, "num_stages": one.num_stages, "maxnreg": one.most_registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, local = _resource_usage(compiled.asm["cubin"])
    plain = ", ".join(f"{k}={v}" for k, v in one.constexprs.items() if k.isupper() and v is not None)
    configuration = f"{plain}; {one.num_warps} warps, {one.num_stages} stages"
    if one.most_registers:
        configuration += f", at most {one.most_registers} registers"
    return Resources(
        op, one.kernel.fn.__name__, one.shape, configuration, capability, registers, local, compiled.metadata.shared
    )


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and local-memory bytes per thread of the one function in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", printed.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected a line of resource usage, got {printed.stdout!r}")
    registers, stack, local = (int(x) for x in found.groups())
    return registers, stack + local


def compile_all(ops: Sequence[str] = OPS, capabilities: Sequence[int] = CAPABILITIES) -> Iterator[Resources]:
    """Every configuration of the ops on every architecture that it is for."""
    for op in ops:
        module = importlib.import_module(f"mc_kernels.{op}.triton_kernel")
        for one in module.compilations():
            for capability in capabilities:
                if not one.capabilities or capability in one.capabilities:
                    yield compile_one(op, one, capability)


def table(rows: Sequence[Resources], version: str) -> str:
    """The rows as a Markdown page: one line per configuration, the architectures side by side."""
    capabilities = sorted({row.capability for row in rows})
    heads = [f"sm_{c}: registers / spilled / shared bytes" for c in capabilities]
    lines = [
        "# What the Triton kernels take",
        "",
        f"`python -m mc_kernels.triton_report --out docs/triton_resources.md`, Triton {version}.",
        "Registers and spilled bytes are per thread, shared memory is per block. -: not launched there.",
        "",
        f"| kernel | shape | configuration | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(heads)}",
    ]
    by_configuration: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for row in rows:
        by_configuration.setdefault((row.kernel, row.shape, row.configuration), {})[row.capability] = row
    for (kernel, shape, configuration), found in by_configuration.items():
        cells = [
            f"{found[c].registers} / {found[c].local_bytes} / {found[c].shared_bytes}" if c in found else "-"
            for c in capabilities
        ]
        lines.append(f"| {kernel} | {shape} | {configuration} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Resources of the Triton kernels, compiled without a GPU.")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--capabilities", nargs="+", type=int, choices=CAPABILITIES, default=CAPABILITIES)
    parser.add_argument("--out", type=Path, help="write the table here (Markdown) instead of to the terminal")
    options = parser.parse_args(argv)
    import triton

    rows = list(compile_all(options.ops, options.capabilities))
    page = table(rows, triton.__version__)
    if options.out:
        options.out.write_text(page)
    else:
        print(page)
    bad = [row for row in rows if row.problem]
    for row in bad:
        print(f"{row.kernel} ({row.shape}, {row.configuration}) on sm_{row.capability}: {row.problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
