"""What the CUDA kernels take, read from the compiler's own words at the build: registers, shared memory, spills.

`python build_cuda.py --resources docs/cuda_resources.md`. A kernel that spills registers is an error.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from build_cuda import WORK, _ninja_file, architectures, toolkit
from build_native import BuildError, alone_in, run_ninja

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Resources:
    """Of one kernel on one architecture: registers, spilled bytes and bytes of stack (what called functions are handed)
    a thread, static shared bytes a block."""

    op: str
    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int
    shared_bytes: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.spilled_bytes} / {self.stack_bytes} / {self.shared_bytes}"


def read(op: str, log: str) -> list[Resources]:
    """The kernels that a log of `nvcc -Xptxas -v` speaks of. What a kernel calls is listed behind it and counts as its
    own."""
    out = []
    for part in re.split(r"(?=Compiling entry function)", log):
        found = _KERNEL.search(part)
        if found is None:
            continue
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        spilled = max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
        stack = re.search(r"(\d+) bytes cumulative stack size", found["rest"])
        out.append(
            Resources(
                op, found["name"], found["arch"], int(found["registers"]), spilled,
                int(stack[1]) if stack else int(found["stack"]), int(shared[1]) if shared else 0,
            )
        )  # fmt: skip
    return out


def demangled(names: list[str]) -> dict[str, str]:
    """Readable names: without namespaces, arguments and the words that all have in common."""
    done = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    plain = [
        re.sub(r"^void |mc::cuda::|\(anonymous namespace\)::|\(.*\)$", "", line) for line in done.stdout.split("\n")
    ]
    return dict(zip(names, plain, strict=False))


def table(rows: list[Resources], version: str) -> str:
    """The rows as a Markdown page: one line a kernel, the architectures side by side."""
    names = demangled(sorted({row.kernel for row in rows}))
    archs = list(dict.fromkeys(row.architecture for row in rows))
    archs.sort(key=lambda a: int(a.rstrip("a")))
    lines = [
        "# What the CUDA kernels take",
        "",
        f"`make cuda-resources`, nvcc {version}: registers / spilled bytes / bytes of stack per thread / bytes of",
        "static shared memory per block.",
        "",
        f"| op | kernel | {' | '.join(f'sm_{a}' for a in archs)} |",
        f"|---|---|{'---|' * len(archs)}",
    ]
    by_kernel: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        by_kernel.setdefault((row.op, names[row.kernel]), {})[row.architecture] = row
    for (op, kernel), found in sorted(by_kernel.items()):
        cells = [str(found[a]) if a in found else "" for a in archs]
        lines.append(f"| {op} | {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(out: Path) -> int:
    """Build, write the table, name what spills. Returns the exit status."""
    try:
        nvcc = toolkit()
        archs = architectures(nvcc)
        if not archs:
            raise BuildError("no architecture to build for (MC_CUDA_ARCHS)")
    except BuildError as e:
        print(f"SKIPPED: the table of CUDA resources: {e}", file=sys.stderr)
        return 0
    try:
        with alone_in(WORK):
            run_ninja(_ninja_file(nvcc, archs), WORK)
    except BuildError as e:
        print(f"the CUDA kernels were not built: {e}", file=sys.stderr)
        return 1
    rows = []
    for log in sorted(WORK.glob("*_cuda.o.log")):
        rows += read(log.name.removesuffix("_cuda_cuda.o.log"), log.read_text())
    version = subprocess.run([nvcc, "--version"], text=True, capture_output=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", version)
    out.write_text(table(rows, found[1] if found else "?"))
    bad = [row for row in rows if row.spilled_bytes]
    names = demangled([row.kernel for row in bad])
    for row in bad:
        print(
            f"{names[row.kernel]} on sm_{row.architecture}: {row.spilled_bytes} bytes of registers spilled",
            file=sys.stderr,
        )
    if not rows:
        print("no kernel was found in the compiler's logs", file=sys.stderr)
    return 1 if bad or not rows else 0
