"""The native library as such: its build, the choice of an instruction set level, its threads, and what it refuses."""

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
from torch import Tensor

from mc_kernels import extension, native

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=120)


def build_module() -> Any:
    spec = importlib.util.spec_from_file_location("build_native", ROOT / "build_native.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_library_is_there() -> None:
    """Otherwise every test of it would skip and nobody would notice."""
    assert native.available() is None
    assert {"scalar", "amx-emulated"} <= set(native.isa_levels())


@pytest.mark.parametrize(
    ("compiler", "words"), [("/nowhere/c++", "no C++ compiler found"), ("false", "compiling failed")]
)
def test_what_cannot_be_built_is_explained_once(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", compiler)
    made = build_module().build_or_explain(tmp_path / "out", tmp_path / "work")
    said = capsys.readouterr().err
    assert said.count("native kernels were not built, PyTorch serves in their place") == 1
    assert words in said
    assert [p.name for p in made] == ["not_built.txt"]
    assert words in made[0].read_text()
    assert len(made[0].read_text().splitlines()) == 1


def test_without_the_library_the_reason_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "FOLDER", tmp_path)
    extension._load.cache_clear()
    try:
        assert native.available() == "native code was not built (reinstall the package)"
        extension._load.cache_clear()
        (tmp_path / "not_built.txt").write_text("no C++ compiler found\n")
        assert native.available() == "native code was not built: no C++ compiler found"
        assert native.isa_levels() == []
        (tmp_path / "not_built.txt").unlink()
        (tmp_path / "_C.so").write_bytes(b"no library")
        extension._load.cache_clear()
        assert (native.available() or "").startswith("native code does not load: ")
        (tmp_path / "not_built.txt").write_text("no C++ compiler found\n")
        extension._load.cache_clear()
        with pytest.raises(RuntimeError, match=r"no C\+\+ compiler found"):
            native.library()
    finally:
        extension._load.cache_clear()


SPLICE = """
import torch
from mc_kernels import Edit, SplicePlan, kv_splice_, native
x = torch.arange(48.0).view(1, 2, 12, 2)
new = torch.zeros(1, 2, 1, 2)
kv_splice_(x, x.clone(), new, new.clone(), SplicePlan.from_edits(12, [Edit(2, 3, 1)], capacity=12))
print(native.library().cpu_isa())
"""


@built
@pytest.mark.parametrize("level", native.isa_levels())
def test_the_environment_names_a_level(level: str) -> None:
    done = python(SPLICE, MC_CPU_ISA=level)
    assert done.stdout.strip() == level, done.stderr


@built
def test_the_best_level_is_the_default() -> None:
    assert python(SPLICE, MC_CPU_ISA="").stdout.strip() == native.isa_levels()[-1]


@built
def test_an_unknown_level_is_an_error() -> None:
    """Nothing falls back in silence: a call says what the variable holds and what it may hold."""
    done = python(SPLICE, MC_CPU_ISA="sse9")
    assert done.returncode != 0
    names = ", ".join(native.isa_levels())
    assert f"ValueError: MC_CPU_ISA: expected one of {names} (the levels of this machine), got 'sse9'" in done.stderr


@built
def test_setting_a_level() -> None:
    library = native.library()
    before = library.cpu_isa()
    try:
        library.set_cpu_isa("scalar")
        assert library.cpu_isa() == "scalar"
        with pytest.raises(ValueError, match=r"mc_set_cpu_isa: expected one of .*scalar.*got 'neon'"):
            library.set_cpu_isa("neon")
        assert library.cpu_isa() == "scalar"
    finally:
        library.set_cpu_isa(None)
    assert library.cpu_isa() == before


FORK = """
import os
import torch
from mc_kernels import native
from mc_kernels.kv_splice.cases import Case
from mc_kernels import kv_splice_
torch.set_num_threads(3)
case = Case("big", 4, 3, 64, 2048, 8, "mixed", theta=1e5)
args, want = case.make(torch.bfloat16), case.make(torch.bfloat16)
kv_splice_(**want)  # starts the pool
child = os.fork()
kv_splice_(**args)
# Compared by numpy: a child that enters OpenMP, as torch's operations on large tensors do, hangs.
same = (args["v"].view(torch.int16).numpy() == want["v"].view(torch.int16).numpy()).all()
if child == 0:
    os._exit(0 if same else 3)
assert same
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("both")
"""


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_threads_of_its_own() -> None:
    done = python(FORK)
    assert done.stdout.strip() == "both", done.stderr


class Call:
    """A valid call of the library's own entry: R = 2 rows, 1 head, 6 slots, 4 dimensions; entry 1 of 5 goes."""

    def __init__(self) -> None:
        def tensor(*shape: int) -> Tensor:
            return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))

        self.kept: list[Tensor] = []
        k, v = tensor(2, 1, 1, 6, 4), tensor(2, 1, 1, 6, 4)
        self.tensors = {"k": k, "v": v, "k_new": tensor(2, 1, 1, 4), "v_new": tensor(2, 1, 1, 4)}
        self.args: dict[str, Any] = {name: list(native.view(x)) for name, x in self.tensors.items()}
        self.args |= {"table": None, "n_plans": 1, "rows": 0, "positions": 0, "new_positions": 0, "inv_freq_rows": 1}
        self.args |= {"half": 2, "interleaved": False, "attention_scaling": 1.0, "n_threads": 1}
        self.array("offsets", [[0, 0, 0, 0, 0], [1, 1, 1, 5, 5]])
        self.array("segments", [[2, 1, 3]])
        self.array("stays", [[0, 0, 1]])
        self.array("insert_slots", [4])
        self.array("inv_freq", [1.0, 0.1], torch.float64)

    def array(self, name: str, values: Any, dtype: torch.dtype = torch.int64) -> None:
        self.kept.append(torch.tensor(values, dtype=dtype))
        self.args[name] = self.kept[-1].data_ptr()

    def view(self, name: str, part: int, value: Any) -> None:
        self.args[name][part] = value

    def table(self, values: Any, dtype: torch.dtype = torch.int32) -> None:
        """Two sequences' pages of 6 slots each, in place of 2 layers."""
        self.kept.append(torch.tensor(values, dtype=dtype))
        self.args["table"] = native.view(self.kept[-1])
        for name in ("k", "v"):
            self.view(name, 2, (1, 2, 1, 6, 4))

    def run(self) -> None:
        args = {n: tuple(x) if isinstance(x, list) else x for n, x in self.args.items()}
        native.library().kv_splice(**args)


REFUSED: dict[str, tuple[Callable[[Call], None], type[Exception], str]] = {
    "dims": (lambda c: c.view("k", 2, (2, 1, 6, 4)), ValueError, "k: expected as many sizes as strides"),
    "4-D": (lambda c: c.args.update(k=c.args["k_new"]), ValueError, "k: expected 5 dimensions, got 4"),
    "dtype": (lambda c: c.view("k", 1, 7), TypeError, "k: expected dtype MC_F32, MC_F16 or MC_BF16, got 7"),
    "dtypes": (lambda c: c.view("v", 1, 2), TypeError, "v: expected dtype 0 as k, got 2"),
    "negative size": (lambda c: c.view("k", 2, (2, 1, 1, -6, 4)), ValueError, "k: expected sizes >= 0"),
    "negative stride": (
        lambda c: c.view("k", 3, (24, 24, 24, -4, 1)), ValueError, "k: expected strides >= 0, got stride[3] = -4",
    ),
    "last stride": (lambda c: c.view("v", 3, (48, 48, 48, 8, 2)), ValueError, "v: expected a contiguous last"),
    "overlap": (lambda c: c.view("k", 3, (24, 24, 24, 3, 1)), ValueError, "k: expected a view without overlap"),
    "no address": (lambda c: c.view("k", 0, 0), ValueError, "k: expected an address, got NULL"),
    "v is k": (lambda c: c.view("v", 0, c.args["k"][0]), ValueError, "v: expected memory apart from k"),
    "v shape": (lambda c: c.view("v", 2, (2, 1, 1, 5, 4)), ValueError, "v: expected shape [2, 1, 1, 6, 4]"),
    "k_new shape": (lambda c: c.view("k_new", 2, (1, 1, 1, 4)), ValueError, "k_new: expected shape [2, 1, *, 4]"),
    "v_new shape": (lambda c: c.view("v_new", 2, (2, 1, 2, 4)), ValueError, "v_new: expected shape [2, 1, 1, 4]"),
    "no plan": (lambda c: c.args.update(n_plans=0), ValueError, "n_plans: expected at least 1, got 0"),
    "no offsets": (lambda c: c.args.update(offsets=0), ValueError, "offsets: expected an array"),
    "no segments": (lambda c: c.args.update(segments=0), ValueError, "segments: expected an array, got NULL"),
    "no rows": (lambda c: c.args.update(n_plans=2), ValueError, "rows: expected the plan of each row"),
    "rows": (lambda c: c.array("rows", [0, 1]), ValueError, "rows[1]: expected -1..0, got 1"),
    "offsets": (
        lambda c: c.array("offsets", [[0] * 5, [1, -1, 1, 5, 5]]), ValueError,
        "offsets[1]: expected at least 0 in column stays, got -1",
    ),
    "first offset": (
        lambda c: c.array("offsets", [[1, 0, 0, 0, 0], [1, 1, 1, 5, 5]]), ValueError, "offsets[0]: expected 0 in",
    ),
    "length": (
        lambda c: c.array("offsets", [[0] * 5, [1, 1, 1, 7, 5]]), ValueError, "expected lengths of at most 6",
    ),
    "too few new": (
        lambda c: c.array("offsets", [[0] * 5, [1, 1, 2, 5, 5]]), ValueError, "k_new: expected at least 2 entries",
    ),
    "source": (lambda c: c.array("segments", [[2, 1, 4]]), ValueError, "segments[0]: expected slots within 5 before"),
    "destination": (lambda c: c.array("segments", [[0, 3, 3]]), ValueError, "segments[0]: expected slots within 5"),
    "negative": (lambda c: c.array("segments", [[2, -1, 3]]), ValueError, "got (2, -1, 3)"),
    "overflow": (lambda c: c.array("segments", [[2, 1, 2**63 - 1]]), ValueError, "segments[0]: expected slots"),
    "stays": (lambda c: c.array("stays", [[5, 5, 1]]), ValueError, "stays[0]: expected slots within 5"),
    "insert slot": (lambda c: c.array("insert_slots", [5]), ValueError, "insert_slots[0]: expected 0..4, got 5"),
    "half": (lambda c: c.args.update(half=3), ValueError, "half: expected 0..2 (D/2), got 3"),
    "frequencies": (lambda c: c.args.update(inv_freq_rows=3), ValueError, "inv_freq_rows: expected 0, 1 or R = 2"),
    "no frequencies": (lambda c: c.args.update(inv_freq=0), ValueError, "inv_freq: expected an array, got NULL"),
    "one position": (
        lambda c: c.array("positions", [0, 1, 2, 3, 4]), ValueError, "new_positions: expected an array as positions",
    ),
    "threads": (lambda c: c.args.update(n_threads=-1), ValueError, "n_threads: expected at least 0, got -1"),
    "page": (lambda c: c.table([[0], [2]]), ValueError, "table[1, 0]: expected 0..1, got 2"),
    "negative page": (lambda c: c.table([[-1], [1]], torch.int64), ValueError, "table[0, 0]: expected 0..1, got -1"),
    "table dtype": (lambda c: c.table([[0.0], [1.0]], torch.float32), TypeError, "table: expected dtype MC_I32"),
    "table dims": (lambda c: c.table([0, 1]), ValueError, "table: expected 2 dimensions, got 1"),
}  # fmt: skip


@built
@pytest.mark.parametrize("name", REFUSED)
def test_the_library_refuses_before_it_writes(name: str) -> None:
    """What op.py checks in Python another caller may get wrong: an error, not a write out of bounds."""
    change, error, words = REFUSED[name]
    call = Call()
    before = {n: x.clone() for n, x in call.tensors.items()}
    change(call)
    with pytest.raises(error) as caught:
        call.run()
    assert words in str(caught.value)
    for n, x in before.items():
        assert torch.equal(call.tensors[n], x)


@built
def test_the_base_call_is_accepted() -> None:
    """What the refusals start from works, paged or not."""
    for change in (lambda c: None, lambda c: c.table([[1], [0]])):
        call = Call()
        before = call.tensors["v"].clone()
        change(call)
        call.run()
        assert torch.equal(call.tensors["v"][..., 1:4, :], before[..., 2:5, :])
        assert torch.equal(call.tensors["v"][..., 5, :], before[..., 5, :])


@built
def test_no_arguments_at_all_are_refused() -> None:
    library = ctypes.CDLL(str(extension.FOLDER / f"libmc_kernels.{'dylib' if sys.platform == 'darwin' else 'so'}"))
    library.mc_last_error.restype = ctypes.c_char_p
    ops = ("kv_splice", "context_attention", "gist_pool", "collapse", "fused_linear", "decoder_layers", "lens_score")
    for op in (*ops, "gist_encode"):
        assert getattr(library, f"mc_{op}_cpu")(None, 1) == 1, op
        assert library.mc_last_error() == b"args: expected an address, got NULL"
    assert library.mc_gist_encode_pack_cpu(None, 2, None, ctypes.c_int64(0), 1) == 1
    assert library.mc_gist_encode_packed_bytes(None, 2, None) == 1
    assert library.mc_last_error() == b"weights: expected an address, got NULL"


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["tensor", "parameter", "strided", "inference"])
def test_the_library_looks_at_tensors_itself(dtype: torch.dtype, kind: str) -> None:
    """What it sees is what it is told by `view`."""
    with torch.inference_mode(kind == "inference"):
        x, weight = torch.arange(24).view(3, 8).to(dtype), torch.arange(40).view(5, 8).to(dtype)
    if kind == "parameter":
        weight = torch.nn.Parameter(weight)
    elif kind == "strided":
        weight = torch.stack((weight, -weight), 1)[:, 0]
    outs = []
    for given in (lambda t: t, native.view):
        outs.append(out := torch.zeros(3, 5, dtype=dtype))
        native.library().fused_linear(given(x), given(weight), None, 0.0, None, False, None, given(out), 1)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], (x.double() @ weight.detach().double().T).to(dtype))


@built
@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.ones(3, 8, device="meta"), TypeError, "x: expected a tensor in memory"),
        (torch.ones(3, 8).to_sparse(), TypeError, "x: expected a tensor in memory"),
        ("abc", TypeError, "x: expected a tensor in memory"),
        ((1, 2, 3), TypeError, "x: expected a tensor in memory"),
        (torch.ones(1, 1, 1, 1, 3, 8), ValueError, "x: expected at most 5 dimensions, got 6"),
        (torch.ones(3, 8, dtype=torch.float64), TypeError, "x: expected dtype"),
    ],
)
def test_it_refuses_what_is_no_tensor(x: Any, error: type[Exception], words: str) -> None:
    weight, out = torch.ones(5, 8), torch.zeros(3, 5)
    with pytest.raises(error) as caught:
        native.library().fused_linear(x, weight, None, 0.0, None, False, None, out, 1)
    assert words in str(caught.value)
    assert not out.any()
