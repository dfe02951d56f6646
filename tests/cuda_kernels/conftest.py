"""CUDA kernels run natively where there is a GPU (marked `gpu`), and everywhere on emulated blocks and threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mc_kernels import cuda_backend, cuda_extension, extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def emulation() -> Path:
    """The emulated build, made anew where a source has changed."""
    folder = ROOT / "build" / "emulated"
    done = subprocess.run(
        [sys.executable, str(ROOT / "build_cuda.py"), "--emulated", str(folder)], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return folder


@pytest.fixture(params=["native", "emulated"], scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The extension: of the library that ships, which loads without a device, and of the emulated build."""
    if request.param == "native":
        found = cuda_extension.load(extension.FOLDER, "_cuda")
        if isinstance(found, str):
            pytest.skip(found)
        yield found
        return
    with cuda_backend.emulate(request.getfixturevalue("emulation")) as found:
        yield found


@pytest.fixture(
    params=[pytest.param("cpu", id="emulated"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")], scope="module"
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors of a test live."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        yield "cuda"
        return
    with cuda_backend.emulate(request.getfixturevalue("emulation")) as library:
        library.emulate(0, 32, 3, 0)
        yield "cpu"
        library.emulate(0, 0, 1, 0)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors here are tiny: a second thread only adds waiting when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
