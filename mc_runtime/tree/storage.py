"""The few system calls that change a tree, and how their failures are told.

Every write, sync, truncation and commit of a tree goes through the functions of this module, called as
`storage.name(...)`: a test can replace one to fill the disk or to die at a chosen call.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mc_runtime.errors import StorageFullError, TreeError

_FULL = (errno.ENOSPC, errno.EDQUOT)

# macOS has no fdatasync. File sizes are flushed by both.
_sync = getattr(os, "fdatasync", os.fsync)


def create(path: Path) -> int:
    """Open `path` for reading and writing, made if absent; returns a file descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def pwrite(fd: int, data: memoryview, offset: int) -> None:
    """Write all bytes of `data` at byte `offset`; the kernel may take a long write in parts."""
    while len(data):
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def truncate(fd: int, size: int) -> None:
    """Set the file's length to `size` bytes; growing makes a hole, which takes no space."""
    os.ftruncate(fd, size)


def sync_file(fd: int) -> None:
    """Return when the file's content and length are on the device."""
    _sync(fd)


def sync_directory(path: Path) -> None:
    """Return when the names in directory `path` are on the device."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def commit(connection: sqlite3.Connection) -> None:
    """Commit the open transaction: the instant at which a tree's new content becomes its content."""
    connection.execute("COMMIT")


def is_full(error: BaseException) -> bool:
    """Whether `error` says that the disk or the quota is used up."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL


def as_tree_error(error: OSError | sqlite3.Error, path: Path, doing: str) -> TreeError:
    """The error that a user reads for `error`, met at `path` while `doing` ("read", "write to", ...)."""
    if is_full(error):
        return StorageFullError(
            f"the disk that holds {str(path)!r} is full: free space there and try again; "
            "nothing of this transaction was kept, the tree is as it was before"
        )
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    if isinstance(error, sqlite3.OperationalError | OSError):
        advice = "check that the directory exists and who may use it"
    else:
        advice = "its catalogue is damaged or no tree's; restore a backup or use another directory"
    return TreeError(f"cannot {doing} the tree at {str(path)!r}: {' '.join(reason.split())}; {advice}")


@contextmanager
def tree_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn `OSError` and `sqlite3.Error` inside the block into the `TreeError` to show."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        raise as_tree_error(error, path, doing) from error
