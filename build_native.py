"""Builds the native code under csrc/: `libmc_kernels.so` (the C ABI) and the Python extension `_C` that links to it.

Each instruction set level is a translation unit with its own flags, all of them in one library; the choice falls at run
time (csrc/common/isa.cpp). Ninja recompiles what has changed. What cannot be built is a `BuildError` with the reason;
`setup.py` then installs without it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "csrc"
# A sibling of what setuptools makes; kept between builds.
WORK = ROOT / "build" / "native"
MACOS = sys.platform == "darwin"
LIBRARY = "libmc_kernels.dylib" if MACOS else "libmc_kernels.so"
EXTENSION = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
# Where the reason stands when there is no library.
REASON = "not_built.txt"
# Found by pkg-config in a folder of its own. Relative to itself, so that the package may lie anywhere.
PKG_CONFIG = Path("pkgconfig") / "mc_kernels.pc"
PKG_CONFIG_TEXT = """\
prefix=${{pcfiledir}}/..

Name: mc_kernels
Description: Kernels of MegaContext: gist encoding, focus scoring, in-place edits of a KV cache
Version: {version}
Cflags: -I${{prefix}}
Libs: -L${{prefix}} -Wl,-rpath,${{prefix}} -lmc_kernels
"""

# No -ffast-math: NaN, infinities and signed zeros are part of the contract. Nobody reads errno or floating-point traps.
CXXFLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math -Wall -Wextra -pthread"
# Later words win: -O1 keeps the sanitizers' reports readable, and the build short.
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"
# By the last word of a source's name, as in rows_avx2.cpp.
_AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
X86_LEVEL_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": _AVX512,
    "avx512bf16": f"{_AVX512} -mavx512vnni -mavx512bf16",
    "amx": f"{_AVX512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16",
}
# NEON itself is part of every 64-bit Arm.
ARM_LEVEL_FLAGS = {
    "neondot": "-march=armv8.2-a+dotprod",
    "neonbf16": "-march=armv8.2-a+dotprod+bf16+i8mm",
}


class BuildError(Exception):
    """Why the native code could not be built."""


def compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("c++", "g++", "clang++"):
        if shutil.which(name.split()[0]):
            return name
    raise BuildError(f"no C++ compiler found (looked for {wanted or 'c++, g++, clang++'}; CXX names another)")


def ninja() -> list[str]:
    try:
        import ninja

        return [str(Path(ninja.BIN_DIR) / "ninja")]
    except ImportError:
        pass
    found = shutil.which("ninja")
    if not found:
        raise BuildError("ninja not found (pip install ninja)")
    return [found]


def _level_flags(cxx: str) -> dict[str, str]:
    """Of the levels that this compiler knows. Sources of others compile to nothing; the library does without them."""
    # Whom it compiles for, not where it runs: e.g. x86_64-linux-gnu, arm64-apple-darwin24.1.0.
    target = subprocess.run([*cxx.split(), "-dumpmachine"], capture_output=True, text=True).stdout.partition("-")[0]
    known = {"x86_64": X86_LEVEL_FLAGS, "aarch64": ARM_LEVEL_FLAGS, "arm64": ARM_LEVEL_FLAGS}.get(target.strip(), {})
    probe = [*cxx.split(), "-fsyntax-only", "-x", "c++", os.devnull]
    return {
        level: flags
        for level, flags in known.items()
        if subprocess.run([*probe, *flags.split()], capture_output=True).returncode == 0
    }


def _library_sources() -> list[Path]:
    return sorted(SOURCES.glob("*/*.cpp"))


def python_flags() -> str:
    """What a source that includes pybind11 is compiled with."""
    try:
        import pybind11
    except ImportError as e:
        raise BuildError("pybind11 not found (pip install pybind11)") from e
    return include(sysconfig.get_path("include"), pybind11.get_include())


def escape(path: Path) -> str:
    """A path as Ninja writes it where it names a file."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quote(path: Path | str) -> str:
    """A path as Ninja writes it within a command, which a shell runs."""
    return shlex.quote(str(path)).replace("$", "$$")


def include(*folders: Path | str) -> str:
    """Flags that find the headers in `folders`."""
    return " ".join(f"-I{quote(folder)}" for folder in folders)


HEADERS = include(SOURCES / "include", SOURCES / "common")


def _ninja_file(cxx: str) -> str:
    origin = "@loader_path" if MACOS else "$$ORIGIN"
    undefined = "-undefined dynamic_lookup" if MACOS else ""
    name = f"-install_name @rpath/{LIBRARY}" if MACOS else f"-Wl,-soname,{LIBRARY}"
    level_flags = _level_flags(cxx)
    python = python_flags()

    lines = [
        f"cxx = {cxx}",
        f"cxxflags = {CXXFLAGS} {os.environ.get('CXXFLAGS', '')} {HEADERS}",
        f"ldflags = {os.environ.get('LDFLAGS', '')}",
        "rule compile",
        "  command = $cxx $cxxflags $more -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = $cxx -shared -pthread $in -o $out $ldflags $more",
    ]
    objects = []
    for source in _library_sources():
        objects.append(f"{source.parent.name}_{source.stem}.o")
        lines += [f"build {objects[-1]}: compile {escape(source)}"]
        level = source.stem.rpartition("_")[2]
        if level in level_flags:
            lines += [f"  more = {level_flags[level]}"]
    lines += [
        f"build {LIBRARY}: link {' '.join(objects)}",
        f"  more = {name}",
        f"build bindings.o: compile {escape(SOURCES / 'bindings.cpp')}",
        f"  more = {python}",
        f"build {EXTENSION}: link bindings.o | {LIBRARY}",
        f"  more = -L. -lmc_kernels '-Wl,-rpath,{origin}' {undefined}",
        "",
    ]
    return "\n".join(lines)


def _replace(source: Path, destination: Path) -> None:
    """Copy under another name, then rename: a process that has the old file mapped keeps it."""
    fresh = destination.with_name(destination.name + ".new")
    shutil.copy2(source, fresh)
    os.replace(fresh, destination)


def build(destination: Path, work: Path = WORK) -> list[Path]:
    """Build and put the library, the extension, the header and its .pc file into `destination`. Returns their paths.

    work: where objects stay for the next build.
    """
    header = SOURCES / "include" / "mc_kernels.h"
    with alone_in(work):
        run_ninja(_ninja_file(compiler()), work)
        made = install(destination, REASON, (work / LIBRARY, work / EXTENSION, header))
    version = header.read_text().partition('#define MC_VERSION "')[2].partition('"')[0]
    made.append(destination / PKG_CONFIG)
    made[-1].parent.mkdir(exist_ok=True)
    made[-1].write_text(PKG_CONFIG_TEXT.format(version=version))
    return made


@contextmanager
def alone_in(work: Path) -> Iterator[None]:
    """The folder `work`, made if it is not there, for one build at a time: another process that builds in it waits."""
    if os.name != "posix":
        raise BuildError(f"the native code needs a POSIX system, this is {sys.platform}")
    import fcntl

    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_ninja(text: str, work: Path) -> None:
    """Make what the Ninja file `text` says, in the folder `work` (see `alone_in`)."""
    command = ninja()
    (work / "build.ninja").write_text(text)
    jobs = [f"-j{n}"] if (n := os.environ.get("MAX_JOBS")) else []
    done = subprocess.run(
        [*command, *jobs, "-C", str(work)], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        lines = done.stdout.strip().splitlines() or ["no output"]
        said = (x for x in lines if re.search(r"\b(error|fatal)\b.*:", x) and not x.startswith("["))
        raise BuildError(f"compiling failed: {next(said, lines[-1]).strip()}")
    if "warning" in done.stdout:
        print(done.stdout, file=sys.stderr)


def install(destination: Path, reason: str, made: Sequence[Path]) -> list[Path]:
    """Copy what was made into `destination`, where the file `reason` would say why nothing is there."""
    destination.mkdir(parents=True, exist_ok=True)
    (destination / reason).unlink(missing_ok=True)
    for source in made:
        _replace(source, destination / source.name)
    return [destination / source.name for source in made]


def build_or_explain(destination: Path, work: Path = WORK) -> list[Path]:
    """As `build`; where that fails, says so once and leaves the reason in `destination` for `mc_kernels.native`."""
    try:
        return build(destination, work)
    except BuildError as e:
        reason = str(e)
    print(f"megacontext: native kernels were not built, PyTorch serves in their place: {reason}", file=sys.stderr)
    destination.mkdir(parents=True, exist_ok=True)
    for stale in (LIBRARY, EXTENSION, "mc_kernels.h", PKG_CONFIG):
        (destination / stale).unlink(missing_ok=True)
    (destination / REASON).write_text(reason + "\n")
    return [destination / REASON]


def main() -> None:
    """Command line: a sanitized build into a folder."""
    parser = argparse.ArgumentParser(description="Build the native kernels with sanitizers, for tests.")
    parser.add_argument("--sanitize", type=Path, required=True, metavar="DESTINATION")
    destination = parser.parse_args().sanitize
    for name, flags in (("CXXFLAGS", SANITIZE), ("LDFLAGS", "-fsanitize=address,undefined")):
        os.environ[name] = f"{os.environ.get(name, '')} {flags}"
    try:
        for path in build(destination, destination / "work"):
            print(path)
    except BuildError as e:
        raise SystemExit(f"native kernels were not built: {e}") from None


if __name__ == "__main__":
    main()
