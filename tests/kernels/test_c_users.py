"""What C and C++ programs need of the installed package: flags, a .pc file, a header that both languages take."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mc_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "c" / "splice_cache.c"
STRICT = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
C, CXX = (shutil.which(name) if os.name == "posix" else None for name in ("cc", "c++"))
PKG_CONFIG = shutil.which("pkg-config")
built = pytest.mark.skipif(extension.available() is not None, reason=f"no native library: {extension.available()}")

# Python with an import hook for which torch does not exist.
WITHOUT_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is hidden by the test")
sys.meta_path.insert(0, NoTorch())
"""


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def flags(*options: str) -> list[str]:
    """As `python -m mc_kernels` prints them where torch cannot be imported."""
    code = f"{WITHOUT_TORCH}\nimport runpy\nsys.argv = ['mc_kernels', *{options!r}]\n"
    return shlex.split(run(sys.executable, "-c", code + "runpy.run_module('mc_kernels', run_name='__main__')"))


def build_line() -> list[str]:
    """The command at the top of the example, its flags asked for."""
    line = re.search(r"^ \*   (cc .*)$", EXAMPLE.read_text(), re.MULTILINE)
    assert line is not None
    before, _, rest = line[1].partition("$(python -m mc_kernels ")
    options, _, after = rest.partition(")")
    return [*before.split(), *flags(*options.split()), *after.split()]


@built
@pytest.mark.skipif(C is None, reason="no C compiler")
def test_the_c_example(tmp_path: Path) -> None:
    """The line at the top of the example, with warnings as errors: the header is C99."""
    shutil.copy(EXAMPLE, tmp_path)
    compiler, *words = build_line()
    run(str(shutil.which(compiler)), *STRICT, *words, cwd=tmp_path)
    assert "250 entries before, 219 after" in run(tmp_path / "splice_cache")


PROGRAM = """
#include <mc_kernels.h>
#include <cstdio>
#include <cstring>
int main() {
    mc_tensor absent{};
    if (std::strcmp(mc_version(), MC_VERSION) != 0 || absent.ndim != 0) return 1;
    std::puts(mc_cpu_isa());
}
"""


@built
@pytest.mark.skipif(CXX is None, reason="no C++ compiler")
@pytest.mark.parametrize("how", ["python", "pkg-config"])
def test_a_cpp_program(how: str, tmp_path: Path) -> None:
    if how == "pkg-config":
        if PKG_CONFIG is None:
            pytest.skip("no pkg-config")
        folder = flags("--pkgconfigdir")[0]
        found = shlex.split(run(PKG_CONFIG, "--cflags", "--libs", "mc_kernels", PKG_CONFIG_PATH=folder))
    else:
        found = flags("--cflags", "--libs")
    source, program = tmp_path / "program.cpp", tmp_path / "program"
    source.write_text(PROGRAM)
    run(str(CXX), "-std=c++17", *STRICT, str(source), *found, "-o", program)
    assert run(program).strip() in extension.isa_levels()


@built
def test_folders_and_version() -> None:
    include, library, version = flags("--includedir", "--libdir", "--version")
    assert (Path(include) / "mc_kernels.h").read_text() == (ROOT / "csrc" / "include" / "mc_kernels.h").read_text()
    assert list(Path(library).glob("libmc_kernels.*"))
    assert version == extension.library().version()


@built
@pytest.mark.skipif(PKG_CONFIG is None, reason="no pkg-config")
def test_the_pc_file_goes_where_the_package_goes(tmp_path: Path) -> None:
    """Wheels are unpacked anywhere: another folder, other flags."""
    moved = tmp_path / "elsewhere" / "pkgconfig"
    shutil.copytree(flags("--pkgconfigdir")[0], moved)
    found = shlex.split(run(str(PKG_CONFIG), "--cflags", "--libs", "mc_kernels", PKG_CONFIG_PATH=str(moved)))
    assert {os.path.normpath(word[2:]) for word in found if word[:2] in ("-I", "-L")} == {str(moved.parent)}
    wanted = run(str(PKG_CONFIG), "--modversion", "mc_kernels", PKG_CONFIG_PATH=str(moved))
    assert wanted.strip() == extension.library().version()


def test_without_the_library_the_reason_is_given(tmp_path: Path) -> None:
    (tmp_path / "not_built.txt").write_text("no C++ compiler found\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MC_NATIVE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "mc_kernels", "--libs"], env=env, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == "mc_kernels: native code was not built: no C++ compiler found"


def test_asked_for_nothing_it_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "mc_kernels"], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 2
    assert "--cflags" in done.stdout
