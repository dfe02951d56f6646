"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mc_kernels import native


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend to name to an op. Parametrised indirectly, by a backend, by `cpu-<level>`: then the native library uses
    that instruction set level meanwhile, or by `cpu-torch`: then it is as if there were no library. (Of the module:
    hypothesis wants nothing that is made anew per test.)"""
    name, _, level = request.param.partition("-")
    if not level:
        yield name
        return
    if level == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "available", lambda: "hidden by the test")
            yield name
        return
    native.library().set_cpu_isa(level)
    try:
        yield name
    finally:
        native.library().set_cpu_isa(None)
