"""CuPy as `mc_kernels.array` uses it, over the CPU's memory: for machines whose kernels are emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

DEVICE = 3


class ndarray:
    """CuPy's array says that it lies on a GPU, and may be read by who says on which stream."""

    __module__ = "cupy._core.core"

    def __init__(self, x: Tensor) -> None:
        self.x, self.dtype, self.shape = x, x.dtype, tuple(x.shape)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, DEVICE

    def __dlpack__(self, *, stream: int) -> Any:
        assert stream != 0, "DLPack leaves open which of CUDA's streams 0 is"
        return self.x.__dlpack__()


def _dtype(given: str | torch.dtype) -> torch.dtype:
    return given if isinstance(given, torch.dtype) else getattr(torch, given)


def module() -> Any:
    """A module to stand in `sys.modules` as cupy. `made`: shapes of what was allocated. `devices`: made current."""
    cupy: Any = ModuleType("cupy")
    cupy.ndarray, cupy.made, cupy.devices = ndarray, [], []

    def empty(shape: tuple[int, ...], dtype: Any) -> ndarray:
        assert cupy.devices, "allocated before the arrays' device was made current"
        cupy.made.append(shape)
        x = torch.empty(shape, dtype=_dtype(dtype))
        return ndarray(x.fill_(float("nan")) if x.is_floating_point() else x.fill_(1))

    @contextmanager
    def current(index: int) -> Iterator[None]:
        cupy.devices.append(index)
        yield

    cupy.empty = empty
    cupy.asarray = lambda x: ndarray(torch.from_numpy(x.copy()))
    cupy.ascontiguousarray = lambda x, dtype: ndarray(x.x.to(_dtype(dtype)).contiguous())
    cupy.cuda = SimpleNamespace(Device=current, get_current_stream=lambda: SimpleNamespace(ptr=0))
    return cupy
