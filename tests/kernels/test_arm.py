"""The sources of the levels for Arm, on whatever machine this is: that they compile, without a warning, with the
instructions they are for. That they compute the right thing: tests/arm/run.sh."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_build import ROOT, module

pytest.importorskip("ziglang", reason="no compiler for other machines (pip install ziglang)")
builder = module("build_native")
LEVELS = {"neon": "", **builder.ARM_LEVEL_FLAGS}
NEEDS = {"neon": "__ARM_NEON", "neondot": "__ARM_FEATURE_DOTPROD", "neonbf16": "__ARM_FEATURE_BF16_VECTOR_ARITHMETIC"}


def compile_for(target: str, flags: str, cache: Path, *arguments: str | Path) -> str:
    """Zig's Clang, which names a processor where others name an architecture; returns what it says."""
    cpu = "-mcpu=generic" + flags.partition("-a")[2]
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, cpu, "-std=c++17", "-O0", "-Wall", "-Wextra"]
    folders = [f"-I{ROOT / 'csrc' / name}" for name in ("include", "common")]
    env = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
    done = subprocess.run([*command, *folders, *map(str, arguments)], env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zig")


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_compiles(level: str, cache: Path) -> None:
    defined = compile_for("aarch64-linux-gnu", LEVELS[level], cache, "-dM", "-E", "-x", "c++", os.devnull)
    assert NEEDS[level] in defined
    sources = sorted((ROOT / "csrc").glob(f"*/*_{level}.cpp"))
    assert sources
    for source in sources:
        compile_for("aarch64-linux-gnu", LEVELS[level], cache, "-c", source, "-o", cache / "level.o")


@pytest.mark.parametrize("system", ["linux-gnu", "macos"])
def test_the_choice_compiles(system: str, cache: Path) -> None:
    source = ROOT / "csrc" / "common" / "isa.cpp"
    compile_for(f"aarch64-{system}", "", cache, "-c", source, "-o", cache / "isa.o")
