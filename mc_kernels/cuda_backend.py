"""What the CUDA C++ versions of the ops share: whether `libmc_kernels_cuda` can run here, registration, launches.

Where kernels are emulated (`cuda_extension.emulate`) tensors are expected on the CPU. The registry never picks CUDA
kernels for CPU tensors by itself, there they have to be named.
"""

from __future__ import annotations

import functools
import importlib
import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
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


# What is kept of earlier calls ends with that many kinds of them.
MOST_KINDS = 1024
# Devices that the library has been found to serve: torch takes several microseconds to say what a device is.
_served: set[int] = set()


def available() -> str | None:
    """Reason why the CUDA library cannot serve here, or None."""
    module = found()
    if isinstance(module, str):
        return module
    if emulated():
        return None
    if torch.cuda.is_initialized():
        at = torch._C._cuda_getDevice()
        if at not in _served:
            reason = _unserved(module.architectures(), torch.cuda.get_device_capability(at))
            if reason is not None:
                return reason
            _served.add(at)
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _unserved(module.architectures(), torch.cuda.get_device_capability())


def refuse_device(tensors: Iterable[Tensor | None]) -> str | None:
    """Reason why CUDA kernels cannot take tensors that live where these do, or None."""
    if emulated():
        other = next((x for x in tensors if x is not None and not x.is_cpu), None)
        return None if other is None else f"expected cpu tensors (kernels are emulated), got {other.device}"
    other = next((x for x in tensors if x is not None and not x.is_cuda), None)
    return None if other is None else f"expected cuda tensors, got {other.device}"


def refuse(*args: object) -> str | None:
    """`supports` of most ops: every tensor among the arguments on the right device, none of them fp64."""
    tensors = [x for x in args if isinstance(x, Tensor)]
    wide = any(x.dtype == torch.float64 for x in tensors)
    return refuse_device(tensors) or ("fp64 is for the oracle" if wide else None)


def register_cuda(
    op: str, module: str, function: str, supports: Callable[..., str | None] = refuse
) -> Callable[..., Any]:
    """Register `module.function` as the CUDA version of `op`; the module is imported at the first call."""

    imported: ModuleType | None = None

    def call(*args: Any) -> Any:
        nonlocal imported
        if imported is None:
            imported = importlib.import_module(module)
        return getattr(imported, function)(*args)

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


def array(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """`x` contiguous and in a dtype, where it is: `x` itself where it is so already (torch takes longer to say so)."""
    return x if x is None or (x.dtype is dtype and x.is_contiguous()) else x.to(dtype).contiguous()


# By `id` of a tensor and stream: the tensor while it lives, its version, and its values in fp64, made on that stream.
_doubles: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, Tensor]] = {}


def frequencies(x: Tensor | None) -> Tensor | None:
    """RoPE's `inv_freq` in fp64 and contiguous. A model passes the same tensor in every call: its fp64 values are kept,
    since to convert it anew is a kernel of its own before every call."""
    if x is None or (x.dtype is torch.float64 and x.is_contiguous()):
        return x
    if x.is_inference() or not x.is_cuda:  # has no version, so that a write to it would not be seen; costs no launch
        return x.to(torch.float64).contiguous()
    if torch.cuda.is_current_stream_capturing():  # what a graph allocates is the graph's
        return x.to(torch.float64).contiguous()
    key = id(x), current_stream(x)
    known = _doubles.get(key)
    if known is not None and known[0]() is x and known[1] == x._version:
        return known[2]
    if len(_doubles) >= MOST_KINDS:
        _doubles.clear()
    double = x.to(torch.float64).contiguous()
    _doubles[key] = weakref.ref(x), x._version, double
    return double


_HERE = nullcontext()


def on_device_of(like: Tensor) -> AbstractContextManager[Any]:
    """A context in which `like`'s device is the current one; nothing where it is so already."""
    if not like.is_cuda or like.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device_of(like)


def current_stream(like: Tensor) -> int:
    """Address of the current stream of `like`'s device."""
    return torch._C._cuda_getCurrentRawStream(like.get_device()) if like.is_cuda else 0


def workspace_bytes(call: Callable[[Any], int], like: Tensor) -> int:
    """What `launch` would allocate for `call`; of some ops it depends on the device."""
    with on_device_of(like):
        return call(None)


# Bytes that were enough for the last calls of a kind: to ask the library takes it as long as to prepare the launch.
_enough: dict[Hashable, int] = {}


def _ask(call: Callable[[Any], int], kind: Hashable) -> int:
    if len(_enough) >= MOST_KINDS:  # shapes that grow from call to call
        _enough.clear()
    _enough[kind] = max(call(None), _enough.get(kind, 0))
    return _enough[kind]


def launch(call: Callable[[Any], int], like: Tensor, workspace: Tensor | None, kind: Hashable = None) -> None:
    """Run `call` on the current stream of `like`'s device, with a workspace.

    call: takes the library's `Where`, or None: then it launches nothing and returns the bytes of workspace it needs.
    workspace: uint8, contiguous, on `like`'s device, at least so many bytes on a multiple of 16; None: allocated here
        where one is needed, by torch, for the stream.
    kind: calls of one kind are likely to need the same bytes (op, shapes, dtypes). The library is asked for the first;
        where a later one needs more it refuses before it does anything, and is asked again. None: asked every time.
    """
    with on_device_of(like):
        if workspace is not None:
            if workspace.dtype != torch.uint8 or workspace.device != like.device or not workspace.is_contiguous():
                raise ValueError(
                    f"workspace: expected contiguous uint8 on {like.device}, got {workspace.dtype} on"
                    f" {workspace.device}"
                )
            call(library().Where(workspace.data_ptr(), workspace.numel(), current_stream(like)))
            return
        known = None if kind is None else _enough.get(kind)
        if known is None:
            _run(call, like, call(None) if kind is None else _ask(call, kind))
            return
        try:
            _run(call, like, known)
        except ValueError as error:
            if not str(error).startswith("workspace: expected"):
                raise
            _run(call, like, _ask(call, kind))


def _run(call: Callable[[Any], int], like: Tensor, size: int) -> None:
    memory = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
    call(library().Where(0 if memory is None else memory.data_ptr(), size, current_stream(like)))
