"""Why Triton cannot serve, reason by reason, and that a kernel's module is imported at its first call."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from mc_kernels import BackendError, triton_backend
from mc_kernels.registry import IMPLS, select
from mc_kernels.triton_backend import available, interpreted, refuse, refuse_device, refuse_fp64, register_triton


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


def test_not_installed(native: pytest.MonkeyPatch) -> None:
    native.setattr(triton_backend, "_installed", lambda: False)
    assert "Triton is not installed (pip install 'megacontext[triton]')" in str(available())
    native.setenv("TRITON_INTERPRET", "1")
    assert "not installed" in str(available())


def test_no_device(native: pytest.MonkeyPatch) -> None:
    native.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(available())
    assert "TRITON_INTERPRET=1" in str(available())
    native.setattr(torch.cuda, "is_available", lambda: True)
    assert available() is None


def test_the_interpreter_needs_no_device(native: pytest.MonkeyPatch) -> None:
    native.setattr(torch.cuda, "is_available", lambda: False)
    for value, on in {"1": True, "true": True, "ON": True, "0": False, "": False, "no": False}.items():
        native.setenv("TRITON_INTERPRET", value)
        assert interpreted() == on
        assert (available() is None) == on


def test_wrong_device(native: pytest.MonkeyPatch) -> None:
    tensors = [None, torch.zeros(2)]
    assert refuse_device(tensors) == "expected cuda tensors, got cpu"
    native.setenv("TRITON_INTERPRET", "1")
    assert refuse_device(tensors) is None
    words = "expected cpu tensors (Triton is interpreted: TRITON_INTERPRET is set), got meta"
    assert refuse_device([*tensors, torch.zeros(2, device="meta")]) == words


def test_fp64() -> None:
    assert refuse_fp64([None, torch.zeros(2), torch.zeros(2, dtype=torch.float64)]) == "fp64 is for the oracle"
    assert refuse_fp64([torch.zeros(2), torch.zeros(2, dtype=torch.int64), None]) is None


def test_refuse_looks_at_every_tensor_of_a_call(native: pytest.MonkeyPatch) -> None:
    native.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(2)
    assert refuse(x, 1, None, "word", x.bfloat16()) is None
    assert refuse(x, 1, None, x.double()) == "fp64 is for the oracle"
    assert "got meta" in str(refuse(x, x.to("meta")))


def test_a_module_is_imported_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    op = "op_of_test_triton_backend"
    try:
        call = register_triton(op, "a_module_of_the_test", "add")
        assert call.__name__ == "add"
        assert available() is None
        fn = select(op, "triton", "cpu", (torch.ones(1),))
        with pytest.raises(ModuleNotFoundError, match="a_module_of_the_test"):
            fn(1, 2)
        module = types.ModuleType("a_module_of_the_test")
        module.add = lambda a, b: a + b  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "a_module_of_the_test", module)
        assert fn(1, 2) == 3
        with pytest.raises(BackendError, match="fp64 is for the oracle"):
            select(op, "triton", "cpu", (torch.ones(1, dtype=torch.float64),))
        # For CPU tensors it has to be named.
        with pytest.raises(BackendError, match="no backend can serve on cpu"):
            select(op, None, "cpu", (torch.ones(1),))
    finally:
        IMPLS.pop(op, None)


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, mc_kernels; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
