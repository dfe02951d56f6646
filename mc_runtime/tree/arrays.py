"""One flat file of equal rows, written at its end and read through a memory map.

Writes go through `pwrite`, never through the map: a full disk is then an error to handle and not a signal. The
file is grown in steps ahead of its content (a hole, which takes no space), so that the map is renewed seldom;
what lies past the committed rows has no meaning and is cut on open, on rollback and on close.
"""

import mmap
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc_runtime.errors import TreeError
from mc_runtime.tree import storage

_MIN_STEP = 1 << 16
_MAX_STEP = 1 << 26


class _Mapping:
    """Lends a read-only map to numpy as if it were writable.

    torch warns at every conversion of an array that is flagged read-only. The memory itself stays protected: a
    write through a tensor kills the process and cannot reach the file.
    """

    def __init__(self, fd: int, size: int) -> None:
        # The buffer export keeps the map from being closed while an array still looks at it.
        self._keep = np.frombuffer(mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
        address = self._keep.__array_interface__["data"][0]
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, False)}


class ArrayFile:
    """Rows of `row_bytes` bytes in the file `path`, which is made at the first write.

    Many threads may read while one writes. Methods raise `OSError` as the system does; the caller knows what it
    was doing.
    """

    def __init__(self, path: Path, row_bytes: int, *, writable: bool) -> None:
        self.path = path
        self.row_bytes = row_bytes
        self.dirty = False
        self.created = False
        self._writable = writable
        self._fd = -1
        self._size = 0
        self._map: npt.NDArray[np.uint8] | None = None
        self._remapping = threading.Lock()

    def _open(self) -> int:
        if self._fd < 0:
            if self._writable:
                self.created = not self.path.exists()
                self._fd = storage.create(self.path)
            else:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._size = os.fstat(self._fd).st_size
        return self._fd

    def write(self, row: int, data: npt.NDArray[np.uint8]) -> None:
        """Write the bytes `data` (contiguous, whole rows, at least one) from row `row` on."""
        fd, offset = self._open(), row * self.row_bytes
        self.dirty = True
        end = offset + data.nbytes
        if end > self._size:
            step = min(max(end >> 3, _MIN_STEP), _MAX_STEP)
            size = (end + step + 4095) & ~4095
            storage.truncate(fd, size)
            self._size = size
        storage.pwrite(fd, data.data.cast("B"), offset)

    def read(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes of rows [start, stop) as uint8 `[stop - start, row_bytes]`, a view of the map: never write to it.

        Raises `TreeError` when the file is too short.
        """
        if start == stop:
            return np.empty((0, self.row_bytes), np.uint8)
        first, last = start * self.row_bytes, stop * self.row_bytes
        mapped = self._map
        if mapped is None or mapped.size < last:
            mapped = self._remap(last)
        return mapped[first:last].reshape(stop - start, self.row_bytes)

    def _remap(self, size: int) -> npt.NDArray[np.uint8]:
        with self._remapping:
            fd = self._open()
            available = os.fstat(fd).st_size
            if available < size:
                raise self._too_short(available, size)
            # Views of the old map keep it alive; it shows the same pages.
            try:
                self._map = np.asarray(_Mapping(fd, available))
            except ValueError:
                # A writer in another process has just cut its file; never below what is committed.
                self._map = np.asarray(_Mapping(fd, size))
            return self._map

    def check(self, rows: int) -> None:
        """Raise `TreeError` unless the file holds `rows` rows."""
        available = self.path.stat().st_size if self.path.exists() else 0
        if available < rows * self.row_bytes:
            raise self._too_short(available, rows * self.row_bytes)

    def cut(self, rows: int) -> None:
        """Drop everything after the first `rows` rows."""
        if self._fd < 0 and not self.path.exists():
            return
        fd, size = self._open(), rows * self.row_bytes
        if self._size > size:
            storage.truncate(fd, size)
            self._size = size

    def sync(self) -> None:
        """Bring what was written to the device."""
        if self.dirty:
            storage.sync_file(self._fd)
            self.dirty = False

    def close(self) -> None:
        """Close the file; arrays handed out stay readable."""
        self._map = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _too_short(self, available: int, wanted: int) -> TreeError:
        return TreeError(
            f"{str(self.path)!r} has {available} bytes where the catalogue counts {wanted}: "
            "the tree is damaged; restore a backup"
        )
