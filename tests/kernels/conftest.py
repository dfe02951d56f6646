"""Fixtures of the kernel tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from mc_kernels import extension, native
from mc_kernels.context_attention import cpu_native


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend to name to an op. Parametrised indirectly, by a backend, by `cpu-<level>`: then the native library uses
    that instruction set level meanwhile, by `cpu-<level>-tiles`: and any number of queries is attended as many are, or
    by `cpu-torch`: then it is as if there were no library. (Of the module: hypothesis wants nothing that is made anew
    per test.)"""
    name, _, level = request.param.partition("-")
    tiles, level = level.endswith("-tiles"), level.removesuffix("-tiles")
    if not level:
        yield name
        return
    if level == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "available", lambda: "hidden by the test")
            yield name
        return
    library = ctypes.CDLL(next(str(p) for p in extension.FOLDER.glob("libmc_kernels.*")))
    native.library().set_cpu_isa(level)
    library.mc_probe_attention_tiles(ctypes.c_int64(0 if tiles else -1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_native, "MOST_PORTABLE_QUERIES", 1 << 60)
        try:
            yield name
        finally:
            native.library().set_cpu_isa(None)
            library.mc_probe_attention_tiles(ctypes.c_int64(-1))
