"""Arrays in CUDA memory: CuPy's, whose allocator and current stream the CUDA library works with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import cuda_extension
from .views import Array, array, cupy_of, floats, integers


class Device:
    """The device that an array lives on, made the current one within `with`.

    library: the CUDA library's extension; `Device(x)` raises RuntimeError with the reason where there is none. stream:
    CuPy's current one on the device: what is queued on it before a call is seen by the call, and what the call frees is
    used again by later work on it alone.
    """

    def __init__(self, like: Array) -> None:
        self.name, self.library, self._cupy = like.device, cuda_extension.library(), cupy_of(like.given)
        self._current = ExitStack()

    def __enter__(self) -> Device:
        self._current.enter_context(self._cupy.cuda.Device(int(self.name.partition(":")[2])))
        self.stream: int = self._cupy.cuda.get_current_stream().ptr
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current.close()

    def empty(self, shape: Sequence[int], like: Array | str) -> Array:
        """A fresh array of a dtype: another array's, or by name."""
        dtype, name = (like, like) if isinstance(like, str) else (like.given.dtype, like.dtype)
        return array("fresh", self._cupy.empty(tuple(shape), dtype=dtype), (name,), cuda=True)

    def put(self, x: npt.NDArray[Any]) -> Array:
        """A copy of a NumPy array."""
        return array("copy", self._cupy.asarray(np.ascontiguousarray(x)), (x.dtype.name,), cuda=True)

    def taken(self, name: str, value: Any, dtypes: Sequence[str], dtype: str) -> Array:
        """An array of the caller's, here or in the CPU's memory, as a contiguous one here, of `dtype`."""
        if type(value).__module__.partition(".")[0] == "cupy":
            array(name, value, dtypes, cuda=True)
            return array(name, self._cupy.ascontiguousarray(value, dtype=dtype), (dtype,), cuda=True)
        if dtype == "int64":
            return self.put(integers(name, value))
        given = array(name, value, dtypes)
        return self.put(floats(given) if dtype == "float32" else given.numpy())

    def launch(self, call: Callable[[Any], int]) -> None:
        """Run `call` on the stream. It takes the library's `Where`; with None it launches nothing and returns the bytes
        of workspace that it needs."""
        needed = call(None)
        workspace = self.empty((needed,), "uint8") if needed else None
        call(self.library.Where(0 if workspace is None else workspace.address, needed, self.stream))
