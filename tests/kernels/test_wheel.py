"""What a wheel holds: the package, and what C and C++ programs need of it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_c_users import EXAMPLE, PKG_CONFIG, ROOT, STRICT, WITHOUT_TORCH, C, built, run

NATIVE = "mc_kernels/_native/"
pytestmark = [
    pytest.mark.slow,
    built,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="no source tree to make a wheel of"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `pip wheel` does, in a folder of its own; ninja knows the objects that the tree's own build made."""
    folder = tmp_path_factory.mktemp("wheel")
    command = f"-q egg_info -e {folder} build -b {folder / 'build'} bdist_wheel -d {folder}"
    done = subprocess.run(
        [sys.executable, "setup.py", *command.split()], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "MC_CUDA_ARCHS": ""}, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.skipif(C is None, reason="no C compiler")
def test_a_c_program_builds_against_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Unpacked anywhere and without torch; the header, the library and the .pc file are the wheel's own."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
        names = set(file.namelist())
    assert not wheel.name.endswith("any.whl")
    assert {NATIVE + name for name in ("mc_kernels.h", "libmc_kernels.so", "pkgconfig/mc_kernels.pc")} <= names
    shutil.copy(EXAMPLE, tmp_path)
    site = str(tmp_path / "site")
    code = f"{WITHOUT_TORCH}\nimport runpy\nsys.argv = ['mc_kernels', '--cflags', '--libs', '--pkgconfigdir']\n"
    code += "runpy.run_module('mc_kernels', run_name='__main__')"
    flags, folder = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=site).splitlines()
    found = [shlex.split(flags)]
    if PKG_CONFIG is not None:
        found.append(shlex.split(run(PKG_CONFIG, "--cflags", "--libs", "mc_kernels", PKG_CONFIG_PATH=folder)))
    for words in found:
        paths = [word[2:] for word in words if word[:2] in ("-I", "-L")]
        assert paths
        assert all(os.path.normpath(path) == str(Path(site) / NATIVE) for path in paths)
        run(str(C), *STRICT, EXAMPLE.name, *words, "-o", "program", "-lm", cwd=tmp_path)
        assert "250 entries before, 219 after" in run(tmp_path / "program")


def test_all_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name and not name.startswith(NATIVE)}
    source = {
        str(path.relative_to(ROOT))
        for package in ("mc_kernels", "mc_runtime")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".json", ".safetensors")
    }
    assert names == {name for name in source if not name.startswith(NATIVE)}
