"""The CUDA library's checks, through its C ABI and without a device: a clear status, nothing launched or written."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_kernels import cuda_backend, cuda_extension, extension, native

ROOT = Path(__file__).resolve().parents[2]
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None or os.environ.get("MC_CUDA_ARCHS") == "", reason="no nvcc")
def test_where_there_is_nvcc_the_library_is_there() -> None:
    """Otherwise every test of it would skip and nobody would notice."""
    assert not isinstance(cuda_extension.load(extension.FOLDER, "_cuda"), str)


def test_versions(library: Any) -> None:
    assert library.version() == native.library().version()
    assert set(library.architectures().split(";")) & {"80", "90a", "100", "emulated"}


def valid_splice() -> tuple[dict[str, Any], list[torch.Tensor]]:
    """One edit on a cache [1, 1, 2, 12, 8] of fp32: entries 2..4 become one; and the tensors that hold its memory."""
    k, v, new = torch.zeros(2, 12, 8), torch.zeros(2, 12, 8), torch.ones(2, 1, 8)
    offsets, segments = torch.tensor([[0] * 5, [1, 1, 1, 12, 10]]), torch.tensor([[5, 3, 7]])
    stays, slots, freq = torch.tensor([[0, 0, 2]]), torch.tensor([2]), torch.ones(4, dtype=torch.float64)
    cache, fresh = ((1, 1, 2, 12, 8), (192, 192, 96, 8, 1)), ((1, 2, 1, 8), (16, 8, 8, 1))
    call = {
        "k": (k.data_ptr(), 0, *cache), "v": (v.data_ptr(), 0, *cache), "k_new": (new.data_ptr(), 0, *fresh),
        "v_new": (new.data_ptr(), 0, *fresh), "table": None, "n_plans": 1, "offsets": offsets.data_ptr(), "rows": 0,
        "segments": segments.data_ptr(), "stays": stays.data_ptr(), "insert_slots": slots.data_ptr(), "positions": 0,
        "new_positions": 0, "inv_freq_rows": 1, "inv_freq": freq.data_ptr(), "half": 4, "interleaved": False,
        "attention_scaling": 1.0,
    }  # fmt: skip
    return call, [k, v, new, offsets, segments, stays, slots, freq]


def changed(name: str, at: int, value: object) -> Callable[[dict[str, Any]], None]:
    def change(call: dict[str, Any]) -> None:
        call[name] = (*call[name][:at], value, *call[name][at + 1 :])

    return change


def given(name: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda call: call.update({name: value})


WRONG = {
    "dtype": (changed("v", 1, 2), TypeError, "v: expected dtype 0 as k, got 2"),
    "integer": (changed("k", 1, 4), TypeError, "k: expected dtype MC_F32, MC_F16 or MC_BF16, got 4"),
    "no k": (changed("k", 0, 0), ValueError, "k: expected an address, got NULL"),
    "no k_new": (changed("k_new", 0, 0), ValueError, "k_new: expected an address, got NULL"),
    "shape": (changed("v", 2, (1, 1, 2, 11, 8)), ValueError, r"v: expected shape \[1, 1, 2, 12, 8\], got"),
    "dims": (changed("k", 2, (2, 12)), ValueError, "k: expected as many sizes as strides"),
    "stride": (changed("k", 3, (192, 192, 96, 8, 2)), ValueError, "k: expected a contiguous last dimension"),
    "overlap": (changed("v", 3, (192, 192, 96, 4, 1)), ValueError, "v: expected a view without overlap"),
    "heads": (changed("v_new", 2, (1, 3, 1, 8)), ValueError, "v_new: expected shape"),
    "few inserted": (changed("k_new", 2, (1, 2, 0, 8)), ValueError, "(k_new|v_new): expected"),
    "no plans": (given("n_plans", 0), ValueError, "n_plans: expected at least 1, got 0"),
    "no offsets": (given("offsets", 0), ValueError, "offsets: expected an array"),
    "no segments": (given("segments", 0), ValueError, "segments: expected an array, got NULL"),
    "no slots": (given("insert_slots", 0), ValueError, "insert_slots: expected an array, got NULL"),
    "no inv_freq": (given("inv_freq", 0), ValueError, "inv_freq: expected an array, got NULL"),
    "half": (given("half", 5), ValueError, r"half: expected 0..4 \(D/2\), got 5"),
    "inv_freq_rows": (given("inv_freq_rows", 3), ValueError, "inv_freq_rows: expected 0, 1 or R = 1, got 3"),
    "table": (given("table", (64, 0, (1, 1), (1, 1))), TypeError, "table: expected dtype MC_I32 or MC_I64, got 0"),
    "no table": (given("table", (0, 3, (1, 1), (1, 1))), ValueError, "table: expected an address, got NULL"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_and_nothing_happens(name: str, library: Any) -> None:
    change, error, words = WRONG[name]
    call, memory = valid_splice()
    change(call)
    before = [x.clone() for x in memory]
    for where in (library.Where(0, 0, 0), None):
        with pytest.raises(error, match=words):
            library.kv_splice(**call, where=where)
    assert all(torch.equal(x, y) for x, y in zip(memory, before, strict=True))


def test_sizes_beyond_32_bits(library: Any) -> None:
    call, memory = valid_splice()
    slots = 1 << 31
    for name, base in (("k", 1 << 44), ("v", 1 << 45)):
        call[name] = (base, 0, (1, 1, 2, slots, 8), (16 * slots, 16 * slots, 8 * slots, 8, 1))
    with pytest.raises(ValueError, match=f"k: expected at most {slots - 1}, got {slots}"):
        library.kv_splice(**call, where=library.Where(0, 0, 0))
    assert memory


def test_a_valid_call_without_a_device_says_so(library: Any) -> None:
    if library.emulated or torch.cuda.is_available():
        pytest.skip("there is something to run on")
    call, memory = valid_splice()
    assert library.kv_splice(**call, where=None) == 0
    before = [x.clone() for x in memory]
    with pytest.raises(
        RuntimeError, match=r"kv_splice \((ordered|slots)\): .* at the launch of \d+ blocks of 256 threads"
    ):
        library.kv_splice(**call, where=library.Where(0, 0, 0))
    assert all(torch.equal(x, y) for x, y in zip(memory, before, strict=True))


def test_struct_sizes_and_null_through_the_plain_abi(library: Any) -> None:
    folder = Path(library.__file__).parent
    name = "libmc_kernels_cuda_emulated.so" if library.emulated else "libmc_kernels_cuda.so"
    abi = ctypes.CDLL(str(folder / name))
    abi.mc_cuda_last_error.restype = ctypes.c_char_p
    nothing = ctypes.create_string_buffer(4096)  # struct_size 0
    for call in (abi.mc_kv_splice_cuda, abi.mc_kv_splice_cuda_workspace):
        assert call(None, None, ctypes.c_int64(0), None) == 1
        assert abi.mc_cuda_last_error() == b"args: expected an address, got NULL"
    assert abi.mc_kv_splice_cuda(nothing, None, ctypes.c_int64(0), None) == 1
    assert abi.mc_cuda_last_error().startswith(b"struct_size: expected ")
    assert abi.mc_kv_splice_cuda_workspace(nothing, None) == 1
    assert abi.mc_cuda_last_error() == b"bytes: expected an address, got NULL"


def build_cuda() -> Any:
    sys.path.insert(0, str(ROOT))
    try:
        spec = importlib.util.spec_from_file_location("build_cuda", ROOT / "build_cuda.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(ROOT))


def test_no_architecture_means_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MC_CUDA_ARCHS", "")
    made = build_cuda().build_or_explain(tmp_path / "out", tmp_path / "work")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("megacontext: CUDA kernels were not built: ")
    assert [p.name for p in made] == ["cuda_not_built.txt"]
    found = cuda_extension.load(tmp_path / "out", "_cuda")
    assert found == f"the CUDA library was not built: {made[0].read_text().strip()}"


@pytest.mark.parametrize(
    ("archs", "capability", "served"),
    [
        ("80;90a;100", (8, 0), True), ("80;90a;100", (8, 9), True), ("80;90a;100", (9, 0), True),
        ("80;90a;100", (10, 3), True), ("80;90a;100", (12, 0), True), ("80;90a;100", (7, 5), False),
        ("90a", (9, 0), True), ("90a", (10, 0), False), ("80;90a", (10, 0), True),
    ],
)  # fmt: skip
def test_which_devices_are_served(archs: str, capability: tuple[int, int], served: bool) -> None:
    reason = cuda_backend._unserved(archs, capability)
    assert (reason is None) == served
    assert served or "MC_CUDA_ARCHS" in str(reason)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_only_the_abi_is_exported(library: Any) -> None:
    if library.emulated:
        pytest.skip("the emulated build is for tests")
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", str(extension.FOLDER / "libmc_kernels_cuda.so")], text=True, capture_output=True
    )
    names = {line.split()[-1] for line in shown.stdout.splitlines() if line.split()[-2] in "TDBV"}
    assert names
    assert all(name.startswith("mc_") and name.count("cuda") for name in names), names


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_the_example_without_python(tmp_path: Path) -> None:
    """It is built and linked wherever nvcc is; where there is a device it runs and checks its result."""
    if isinstance(found := cuda_extension.load(extension.FOLDER, "_cuda"), str):
        pytest.skip(found)
    program = tmp_path / "splice_paged"
    where = ["-I", str(ROOT / "csrc" / "include"), "-L", str(extension.FOLDER), "-lmc_kernels_cuda"]
    rpath = ["-Xlinker", f"-rpath,{extension.FOLDER}"]
    source = str(ROOT / "examples" / "cpp" / "splice_paged.cpp")
    done = subprocess.run(
        [NVCC, "-std=c++17", "-Xcompiler", "-Wall,-Wextra,-Werror", source, *where, *rpath, "-o", str(program)],
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = subprocess.run([program], text=True, capture_output=True)
    if torch.cuda.is_available():
        assert ran.returncode == 0, ran.stderr
        assert "250 entries before, 219 after" in ran.stdout
    else:
        assert ran.returncode == 77, ran.stderr
        assert ran.stderr == "no CUDA device: nothing was run\n"
