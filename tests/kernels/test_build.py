"""The build of native code: from any folder, one at a time, and what it says where it fails."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def module(name: str, folder: Path = ROOT) -> Any:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def small_project(folder: Path) -> Any:
    """The builder over a library of one function, in `folder`."""
    for name in ("include", "common", "op"):
        (folder / "csrc" / name).mkdir(parents=True)
    (folder / "csrc" / "include" / "mc_kernels.h").write_text('#define MC_VERSION "7.8.9"\nextern "C" int two(void);\n')
    (folder / "csrc" / "common" / "part.h").write_text("#include <mc_kernels.h>\n")
    (folder / "csrc" / "op" / "part.cpp").write_text(
        '#include <part.h>\n[[gnu::visibility("default")]] int two() { return 2; }\n'
    )
    binding = '#include <part.h>\n#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_C, m) { m.def("two", two); }\n'
    (folder / "csrc" / "bindings.cpp").write_text(binding)
    shutil.copy2(ROOT / "build_native.py", folder)
    return module("build_native", folder)


@needs_compiler
def test_a_folder_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "My Prøject's $x: (1)"
    built = small_project(folder).build(folder / "out")
    # In a process of its own: here a library of that name may be loaded.
    done = subprocess.run(
        [sys.executable, "-c", "import _C; print(_C.two())"], cwd=folder / "out", text=True, capture_output=True
    )
    assert done.stdout == "2\n", done.stderr
    assert "Version: 7.8.9" in built[-1].read_text()


def test_one_build_at_a_time_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of Ninja runs what tells whether another process could build there now."""
    builder = module("build_native")
    code = """
import fcntl, sys
with open(sys.argv[2] + "/lock", "w") as lock:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("error: it has to wait")
sys.exit("error: it could")
"""
    monkeypatch.setattr(builder, "ninja", lambda: [sys.executable, "-c", code])
    monkeypatch.setattr(builder, "_ninja_file", lambda cxx: "")
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.delenv("MAX_JOBS", raising=False)
    with pytest.raises(builder.BuildError, match="compiling failed: error: it has to wait"):
        builder.build(tmp_path / "out", tmp_path / "work")


@pytest.mark.parametrize(
    "said",
    [
        "a.cpp:1:10: fatal error: Python.h: No such file",
        "c++: error: x: No such file",
        "nvcc fatal   : Unsupported gpu",
    ],
)
def test_the_reason_is_what_the_compiler_said(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the command, in which a source or a flag may be called after errors."""
    builder = module("build_native")
    lines = f"[1/9] c++ -Werror -c common/error.cpp -o error.o\\n{said}\\nninja: build stopped: subcommand failed.\\n"
    code = f'import sys; print("{lines}"); sys.exit(1)'
    monkeypatch.setattr(builder, "ninja", lambda: [sys.executable, "-c", code])
    with pytest.raises(builder.BuildError) as caught:
        builder.run_ninja("", tmp_path)
    assert str(caught.value) == f"compiling failed: {said}"


@pytest.mark.parametrize(
    ("value", "want"),
    [("80;90a;100", ["80", "90a", "100"]), (" 80, 90a;80 ", ["80", "90a"]), ("100f", ["100f"]), ("", []), (";", [])],
)
def test_architectures(value: str, want: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CUDA_ARCHS", value)
    assert _build_cuda().architectures(Path("nvcc")) == want


@pytest.mark.parametrize("value", ["sm_80", "80;8.0", "native", "compute_90", "80'"])
def test_architectures_that_have_other_names(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CUDA_ARCHS", value)
    builder = _build_cuda()
    with pytest.raises(builder.BuildError, match="MC_CUDA_ARCHS: expected names as in 80;90a;100, got "):
        builder.architectures(Path("nvcc"))


def _build_cuda() -> Any:
    sys.path.insert(0, str(ROOT))  # it imports its sibling
    try:
        return module("build_cuda")
    finally:
        sys.path.remove(str(ROOT))


@pytest.mark.parametrize(
    ("target", "levels"),
    [
        ("x86_64-linux-gnu", {"avx2", "avx512", "avx512bf16", "amx"}),
        ("aarch64-linux-gnu", {"neondot", "neonbf16"}),
        ("arm64-apple-darwin24.1.0", {"neondot", "neonbf16"}),
        ("riscv64-linux-gnu", set()),
    ],
)
def test_levels_are_those_of_the_compilers_target(target: str, levels: set[str], tmp_path: Path) -> None:
    """Not of the machine that it runs on; the compiler here knows all flags."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = -dumpmachine ] && echo {target}\nexit 0\n')
    compiler.chmod(0o755)
    assert set(module("build_native")._level_flags(str(compiler))) == levels
