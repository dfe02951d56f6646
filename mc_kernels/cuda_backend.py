"""What the CUDA C++ versions of the ops share: whether `libmc_kernels_cuda` can run here, registration, launches.

Where kernels are emulated (`cuda_extension.emulate`) tensors are expected on the CPU. The registry never picks CUDA
kernels for CPU tensors by itself, there they have to be named.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .cuda_extension import emulate as emulate
from .cuda_extension import emulated, found, library
from .registry import IMPLS, register


@functools.cache
def _unserved(architectures: str, capability: tuple[int, int]) -> str | None:
    """Reason why a device of this compute capability cannot run machine code for these architectures ("80;90a;100"; the
    last one without a letter comes as PTX too), or None."""
    major, minor = capability
    names = architectures.split(";")
    numbers = [(int(n.rstrip("af")[:-1]), int(n.rstrip("af")[-1]), n[-1] in "af") for n in names]
    if any(a == major and (b == minor if exact else b <= minor) for a, b, exact in numbers):
        return None
    plain = [(a, b) for a, b, exact in numbers if not exact]
    if plain and plain[-1] <= capability:
        return None
    return f"the CUDA library was built for sm_{', sm_'.join(names)}, this device is sm_{major}{minor} (MC_CUDA_ARCHS)"


def available() -> str | None:
    """Reason why the CUDA library cannot serve here, or None."""
    module = found()
    if isinstance(module, str):
        return module
    if emulated():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _unserved(module.architectures(), torch.cuda.get_device_capability())


def refuse_device(tensors: Iterable[Tensor | None]) -> str | None:
    """Reason why CUDA kernels cannot take tensors that live where these do, or None."""
    expected = "cpu" if emulated() else "cuda"
    for x in tensors:
        if x is not None and x.device.type != expected:
            return f"expected {expected} tensors{' (kernels are emulated)' if emulated() else ''}, got {x.device}"
    return None


def refuse(*args: object) -> str | None:
    """`supports` of most ops: every tensor among the arguments on the right device, none of them fp64."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    wide = any(x.dtype == torch.float64 for x in tensors)
    return refuse_device(tensors) or ("fp64 is for the oracle" if wide else None)


def register_cuda(
    op: str, module: str, function: str, supports: Callable[..., str | None] = refuse
) -> Callable[..., Any]:
    """Register `module.function` as the CUDA version of `op`; the module is imported at the first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), function)(*args)

    call.__name__ = function
    return register(op, "cuda", available=available, supports=supports)(call)


def register_backward(op: str, supports: Callable[..., str | None] = refuse) -> None:
    """Register the backward of an op that has no CUDA version of its own: Triton's where that can serve, else the
    oracle's. A forward that was asked of `cuda` so has gradients."""

    def call(*args: Any) -> Any:
        triton = IMPLS[op].get("triton")
        serves = triton is not None and (triton.available() or triton.supports(*args)) is None
        return IMPLS[op]["triton" if serves else "ref"].fn(*args)

    call.__name__ = f"{op}_cuda"
    register(op, "cuda", available=available, supports=supports)(call)


def current_stream(like: Tensor) -> int:
    """Address of the current stream of `like`'s device."""
    return torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0


def workspace_bytes(call: Callable[[Any], int], like: Tensor) -> int:
    """What `launch` would allocate for `call`; of some ops it depends on the device."""
    with torch.cuda.device_of(like):
        return call(None)


def launch(call: Callable[[Any], int], like: Tensor, workspace: Tensor | None) -> None:
    """Run `call` on the current stream of `like`'s device, with a workspace.

    call: takes the library's `Where`, or None: then it launches nothing and returns the bytes of workspace it needs.
    workspace: uint8, contiguous, on `like`'s device, at least so many bytes on a multiple of 16; None: allocated here
        where one is needed, by torch, for the stream.
    """
    with torch.cuda.device_of(like):
        if workspace is None:
            needed = call(None)
            workspace = torch.empty(needed, dtype=torch.uint8, device=like.device) if needed else None
        elif workspace.dtype != torch.uint8 or workspace.device != like.device or not workspace.is_contiguous():
            raise ValueError(
                f"workspace: expected contiguous uint8 on {like.device}, got {workspace.dtype} on {workspace.device}"
            )
        address, size = (0, 0) if workspace is None else (workspace.data_ptr(), workspace.numel())
        call(library().Where(address, size, current_stream(like)))
