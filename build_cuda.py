"""Builds the CUDA kernels under csrc/: `libmc_kernels_cuda.so` (the C ABI) and the Python extension `_cuda` that links
to it; or, for tests, the same sources as plain C++ on emulated blocks and threads (csrc/common/emulate).

nvcc is looked for in $CUDACXX, $CUDA_HOME, $CUDA_PATH, on the path and in /usr/local/cuda. `MC_CUDA_ARCHS` names the
architectures ("80;90a;100"; empty: no CUDA library), by default those of `ARCHITECTURES` that nvcc knows.

    python build_cuda.py --emulated DESTINATION      the emulated build
    python build_cuda.py --resources FILE            what the kernels take (Markdown); exit status 1 if one spills
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from build_native import (
    CXXFLAGS,
    HEADERS,
    ROOT,
    SOURCES,
    BuildError,
    alone_in,
    compiler,
    escape,
    install,
    python_flags,
    quote,
    run_ninja,
)

ARCHITECTURES = ("80", "90a", "100")
WORK = ROOT / "build" / "cuda"
LIBRARY = "libmc_kernels_cuda.so"
EMULATED_LIBRARY = "libmc_kernels_cuda_emulated.so"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
EXTENSION, EMULATED_EXTENSION = "_cuda" + SUFFIX, "_cuda_emulated" + SUFFIX
REASON = "cuda_not_built.txt"
# Checks run on the host and are those of the CPU library.
CHECKED_BY = sorted(p for p in SOURCES.glob("*/check.cpp") if (p.parent / "cuda.cu").exists())
DEVICE_SOURCES = sorted(SOURCES.glob("*/*.cu"))
# -Xptxas -v: registers and spills of every kernel, kept beside the object for `resources`.
NVCC_FLAGS = "-std=c++17 -O3 -Xptxas -v -Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra"


def toolkit() -> Path:
    """The nvcc to use."""
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]
    places = [os.environ.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes), shutil.which("nvcc")]
    for place in [*places, "/usr/local/cuda/bin/nvcc"]:
        if place and Path(place).is_file():
            return Path(place)
    raise BuildError("no nvcc found (CUDACXX or CUDA_HOME names one)")


def architectures(nvcc: Path) -> list[str]:
    """As "90a": those that are asked for, by default those that this nvcc knows."""
    asked = os.environ.get("MC_CUDA_ARCHS")
    if asked is not None:
        named = list(dict.fromkeys(a for a in re.split(r"[;, ]+", asked) if a))
        if odd := [a for a in named if not re.fullmatch(r"[0-9]{2,3}[af]?", a)]:
            raise BuildError(f"MC_CUDA_ARCHS: expected names as in 80;90a;100, got {odd[0]!r}")
        return named
    known = subprocess.run([nvcc, "--list-gpu-arch"], text=True, capture_output=True)
    names = set(known.stdout.split())
    # The list has no "90a" of its own in some releases.
    return [a for a in ARCHITECTURES if f"compute_{a.rstrip('a')}" in names]


def _objects(rule: str, sources: list[Path]) -> tuple[list[str], list[str]]:
    lines, objects = [], []
    for source in sources:
        objects.append(f"{source.parent.name}_{source.stem}_{rule}.o")
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
    return lines, objects


def _ninja_file(nvcc: Path, archs: list[str]) -> str:
    codes = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    # The newest one's PTX too: later devices compile it when it is first loaded.
    plain = [a for a in archs if not a.endswith("a")]
    if plain:
        codes += f" -gencode arch=compute_{plain[-1]},code=compute_{plain[-1]}"
    defined = f"-DMC_CUDA_ARCHITECTURES='\"{';'.join(archs)}\"'"
    device, device_objects = _objects("cuda", DEVICE_SOURCES)
    host, host_objects = _objects("compile", CHECKED_BY)
    return "\n".join([
        f"nvcc = {quote(nvcc)}",
        f"cxx = {compiler()}",
        "rule cuda",
        # Ninja shows what a command says even where it succeeds; the log keeps it.
        f"  command = $nvcc {NVCC_FLAGS} {codes} {defined} {HEADERS} -MD -MF $out.d -c $in -o $out > $out.log 2>&1"
        " || (cat $out.log; false)",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        f"  command = $cxx {CXXFLAGS} {HEADERS} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link_cuda",
        f"  command = $nvcc -shared -cudart static -ccbin $cxx -Xlinker -soname,{LIBRARY} -Xlinker --exclude-libs,ALL"
        " $in -o $out",
        "rule link",
        f"  command = $cxx -shared $in -o $out -L. -l:{LIBRARY} '-Wl,-rpath,$$ORIGIN'",
        *device,
        *host,
        f"build {LIBRARY}: link_cuda {' '.join(device_objects + host_objects)}",
        f"build bindings.o: compile {escape(SOURCES / 'bindings_cuda.cpp')}",
        f"  more = {python_flags()} -DMC_MODULE=_cuda",
        f"build {EXTENSION}: link bindings.o | {LIBRARY}",
        "",
    ])  # fmt: skip


def _emulated_ninja_file() -> str:
    device, device_objects = _objects("device", DEVICE_SOURCES)
    host, host_objects = _objects("compile", [*CHECKED_BY, *sorted((SOURCES / "common" / "emulate").glob("*.cpp"))])
    # -O1: the build has to be short, and what it runs is small.
    flags = f"{CXXFLAGS} -O1 -Wno-unknown-pragmas {HEADERS}"
    return "\n".join([
        f"cxx = {compiler()}",
        "rule device",
        f"  command = $cxx {flags} -MMD -MF $out.d -x c++ -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule compile",
        f"  command = $cxx {flags} $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -pthread $in -o $out $more",
        *device,
        *host,
        f"build {EMULATED_LIBRARY}: link {' '.join(device_objects + host_objects)}",
        f"  more = -Wl,-soname,{EMULATED_LIBRARY}",
        f"build bindings.o: compile {escape(SOURCES / 'bindings_cuda.cpp')}",
        f"  more = {python_flags()} -DMC_MODULE=_cuda_emulated -DMC_EMULATED",
        f"build {EMULATED_EXTENSION}: link bindings.o | {EMULATED_LIBRARY}",
        f"  more = -L. -l:{EMULATED_LIBRARY} '-Wl,-rpath,$$ORIGIN'",
        "",
    ])  # fmt: skip


def build(destination: Path, work: Path = WORK) -> list[Path]:
    """Build and put the library and its extension into `destination`. Returns their paths."""
    if sys.platform != "linux":
        raise BuildError(f"CUDA needs Linux, this is {sys.platform}")
    nvcc = toolkit()
    archs = architectures(nvcc)
    if not archs:
        raise BuildError("MC_CUDA_ARCHS is empty" if "MC_CUDA_ARCHS" in os.environ else f"{nvcc} is too old")
    with alone_in(work):
        run_ninja(_ninja_file(nvcc, archs), work)
        return install(destination, REASON, (work / LIBRARY, work / EXTENSION))


def build_emulated(destination: Path) -> list[Path]:
    """Build the emulation for tests; objects stay beside it for the next time."""
    work = destination / "work"
    with alone_in(work):
        run_ninja(_emulated_ninja_file(), work)
        return install(destination, REASON, (work / EMULATED_LIBRARY, work / EMULATED_EXTENSION))


def build_or_explain(destination: Path, work: Path = WORK) -> list[Path]:
    """As `build`; where that fails, says so in one line and leaves the reason in `destination`."""
    try:
        return build(destination, work)
    except BuildError as e:
        reason = str(e)
    print(f"megacontext: CUDA kernels were not built: {reason}", file=sys.stderr)
    destination.mkdir(parents=True, exist_ok=True)
    for stale in (LIBRARY, EXTENSION):
        (destination / stale).unlink(missing_ok=True)
    (destination / REASON).write_text(reason + "\n")
    return [destination / REASON]


def main() -> int:
    """Command line, see the module."""
    parser = argparse.ArgumentParser(description="Build the CUDA kernels for tests, or say what they take.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--emulated", type=Path, metavar="DESTINATION", help="the emulated build, into this folder")
    what.add_argument("--resources", type=Path, metavar="FILE", help="compile and write the table of resources")
    options = parser.parse_args()
    if options.resources:
        from cuda_resources import report

        return report(options.resources)
    try:
        for path in build_emulated(options.emulated):
            print(path)
    except BuildError as e:
        raise SystemExit(f"the emulation was not built: {e}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
