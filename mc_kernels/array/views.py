"""Arrays of any kind as the native library takes them, and its results as the caller's own kind.

NumPy's arrays are read as they are (ml_dtypes' bfloat16 too); any other by DLPack, https://dmlc.github.io/dlpack,
without a copy. A result goes back by the `from_dlpack` of the library that the argument came from.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import extension
from ..contracts import describe
from ..extension import View

FLOATS = ("float32", "bfloat16", "float16")
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int32": 4, "int64": 8, "bool": 1, "uint8": 1}
# DLPack's codes.
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_FLOAT, _BFLOAT = 2, 4
_DEVICES = {
    1: "cpu", 2: "cuda", 3: "cuda_host", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm", 11: "rocm_host",
    13: "cuda_managed", 14: "oneapi",
}  # fmt: skip
# Memory that the CPU addresses as its own.
_OF_CPU = ("cpu", "cuda_host", "rocm_host")
# DLPack's number of CUDA's default stream: 0 would be ambiguous.
_LEGACY_STREAM = 1
# Of fresh memory: a cache line, and what XLA asks of memory that it is to take without a copy.
ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Array:
    """An array as the library sees it, with the methods of `contracts.Strided`.

    dtype: its name, such as "bfloat16". strides: in elements. writable: False where its owner says so; None where
    nothing is said (DLPack before version 1). given: the caller's own. held: what keeps the memory.
    """

    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    writable: bool | None
    given: Any = field(repr=False)
    held: Any = field(repr=False)
    device: str = "cpu"

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return prod(self.shape)

    def stride(self) -> tuple[int, ...]:
        return self.strides

    def data_ptr(self) -> int:
        return self.address

    def element_size(self) -> int:
        return _SIZES[self.dtype]

    def split_first(self, outer: int) -> Array:
        """[outer * n, ...] as [outer, n, ...]."""
        inner = self.shape[0] // outer
        first = (self.strides[0] * inner, self.strides[0])
        return replace(self, shape=(outer, inner, *self.shape[1:]), strides=(*first, *self.strides[1:]))

    def view(self) -> View:
        return self.address, extension.dtype_code(self.dtype), self.shape, self.strides

    def numpy(self) -> npt.NDArray[Any]:
        """A NumPy array of the same memory, the CPU's, read only; bfloat16 as its bits in uint16."""
        assert self.device == "cpu"
        if not self.numel():
            return np.empty(self.shape, "u2" if self.dtype == "bfloat16" else self.dtype)
        return np.asarray(_Memory(self))


class _Memory:
    """NumPy's interface to an array's memory."""

    def __init__(self, x: Array) -> None:
        size = x.element_size()
        kind = {"bool": "b", "bfloat16": "u"}.get(x.dtype, x.dtype[0])
        self.held = x.held
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": f"{'|' if size == 1 else '<' if sys.byteorder == 'little' else '>'}{kind}{size}",
            "data": (x.address, True),
            "shape": x.shape,
            "strides": tuple(s * size for s in x.strides),
        }


@describe.register
def _(value: Array) -> str:
    return f"{value.dtype} array of shape {list(value.shape)} ({type(value.given).__name__})"


def array(name: str, value: Any, dtypes: Sequence[str], *, cuda: bool = False) -> Array:
    """`value` in CPU memory; cuda: or CuPy's, in its own. TypeError for what is no array, another dtype or device,
    ValueError for a dimension that runs backwards."""
    found = _of_numpy(name, value) if isinstance(value, np.ndarray) else _of_dlpack(name, value, cuda)
    if found.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {', '.join(dtypes)}, got {describe(found)}")
    if any(n > 1 and s < 0 for n, s in zip(found.shape, found.strides, strict=True)):
        raise ValueError(f"{name}: expected strides >= 0, got {list(found.strides)}")
    return found


def _of_numpy(name: str, value: npt.NDArray[Any]) -> Array:
    dtype = value.dtype.name
    size = value.dtype.itemsize
    if not value.dtype.isnative or any(s % size for s in value.strides if size):
        raise TypeError(f"{name}: expected elements in the machine's byte order at whole steps, got {value.dtype} with "
                        f"strides of {value.strides} bytes")  # fmt: skip
    strides = tuple(s // size for s in value.strides) if size else (0,) * value.ndim
    interface = value.__array_interface__["data"]
    return Array(interface[0], dtype, value.shape, strides, value.flags.writeable, value, value)


def cupy_of(value: Any) -> Any:
    """CuPy, if `value` is an array of its, else None."""
    return sys.modules.get("cupy") if type(value).__module__.partition(".")[0] == "cupy" else None


def _of_dlpack(name: str, value: Any, cuda: bool) -> Array:
    if not (hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__")):
        raise TypeError(f"{name}: expected an array (NumPy's, or one with __dlpack__), got {describe(value)}")
    kind, index = (int(x) for x in value.__dlpack_device__())
    device = _DEVICES.get(kind, f"device type {kind}")
    if device == "cuda" and cuda and (cupy := cupy_of(value)) is not None:
        stream = cupy.cuda.get_current_stream().ptr or _LEGACY_STREAM
        found = _read(name, value, value.__dlpack__(stream=stream))
        return replace(found, device=f"cuda:{index}", writable=True)
    if device not in _OF_CPU:
        expected, hint = "an array in CPU memory", "copy it there"
        if cuda:
            expected += ", or CuPy's on a CUDA device"
            hint = "cupy.from_dlpack shares the memory; torch's tensors are served by the ops of mc_kernels"
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} on {device}:{index} ({hint})")
    # JAX computes behind the caller's back: what has not been computed yet must not be read.
    if hasattr(value, "block_until_ready"):
        value.block_until_ready()
    try:
        try:
            capsule = value.__dlpack__(max_version=(1, 0))
        except TypeError:  # of before DLPack 1
            capsule = value.__dlpack__()
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        raise TypeError(f"{name}: expected an array that DLPack can share, got {type(value).__name__}: {e}") from e
    return _read(name, value, capsule)


def _read(name: str, value: Any, capsule: Any) -> Array:
    try:
        address, code, bits, lanes, shape, strides, writable = extension.library().read_dlpack(capsule)
    except (BufferError, RuntimeError, TypeError, ValueError) as e:
        raise TypeError(f"{name}: expected an array that DLPack can share, got {type(value).__name__}: {e}") from e
    kind_name = _CODES.get(code, f"code {code} ")
    dtype = "bool" if kind_name == "bool" else f"{kind_name}{bits}" + (f" x {lanes}" if lanes != 1 else "")
    return Array(address, dtype, shape, strides, False if _immutable(value) else writable, value, (capsule, value))


def _immutable(value: Any) -> bool:
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(value, jax.Array)


def check_writable(name: str, x: Array) -> None:
    """TypeError with the reason where the memory of `x` may not be written."""
    if x.writable:
        return
    if _immutable(x.given):
        why = "JAX's arrays are immutable (copy it to NumPy with numpy.array, and back afterwards)"
    elif x.writable is None:
        why = "it does not say whether it may be written (DLPack before version 1)"
    else:
        why = "it is read-only"
    raise TypeError(f"{name}: expected an array that may be written, got {describe(x)}: {why}")


def integers(name: str, value: Any) -> npt.NDArray[np.int64]:
    """Any array or nested sequence of integers as contiguous int64."""
    if isinstance(value, np.ndarray | list | tuple | range):
        try:
            got = np.asarray(value)
        except ValueError as e:
            raise TypeError(f"{name}: expected integers, got {describe(value)}") from e
        got = got.astype(np.int64) if got.size == 0 else got
    else:
        got = array(name, value, ("int64", "int32")).numpy()
    if got.dtype.kind not in "iu":
        raise TypeError(f"{name}: expected integers, got dtype {got.dtype}")
    return np.ascontiguousarray(got, dtype=np.int64)


def floats(x: Array) -> npt.NDArray[np.float32]:
    """The values of `x` as contiguous fp32."""
    values = x.numpy()
    if x.dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(values, dtype=np.float32)


def empty(shape: Sequence[int], dtype: str, like: Array | None = None) -> Array:
    """Fresh memory in C order, aligned."""
    size = prod(shape) * _SIZES[dtype]
    whole = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -whole.ctypes.data % ALIGNMENT
    memory = whole[start : start + size]
    strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    return Array(memory.ctypes.data, dtype, tuple(shape), strides, True, None if like is None else like.given, memory)


class _Shared:
    """Fresh memory for another library to take over by DLPack."""

    def __init__(self, x: Array) -> None:
        self._x = x

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **_: Any) -> Any:
        x = self._x
        code = _BFLOAT if x.dtype == "bfloat16" else _FLOAT
        return extension.library().write_dlpack(x.address, code, 8 * x.element_size(), x.shape, x.held)


def _namespace(value: Any) -> Any:
    """The library that `value` is an array of."""
    if hasattr(value, "__array_namespace__"):
        return value.__array_namespace__()
    return sys.modules.get(type(value).__module__.partition(".")[0])


def hand_over(x: Array) -> Any:
    """`x`, made by `empty(..., like=...)`, as an array of the kind of `like`; NumPy's where that kind takes none."""
    namespace = None if isinstance(x.given, np.ndarray) else _namespace(x.given)
    from_dlpack = getattr(namespace, "from_dlpack", None)
    if from_dlpack is not None:
        return from_dlpack(_Shared(x))
    if x.dtype != "bfloat16":
        return x.held.view(x.dtype).reshape(x.shape)
    import ml_dtypes  # a NumPy array of bfloat16 is there, so this is

    return x.held.view(ml_dtypes.bfloat16).reshape(x.shape)
