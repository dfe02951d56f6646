"""The lock that lets one process at a time write to a tree."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from mc_runtime.errors import TreeLockedError


class WriterLock:
    """Exclusive `flock` on the file `path`, held until `release` or the end of the process.

    The kernel drops the lock however the process dies, so a lock file that is left behind means nothing. `flock`
    belongs to the open file, so a second writer in the same process is refused as well. Raises `TreeLockedError`,
    naming the process that holds the lock.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise TreeLockedError(_message(path.parent, pid)) from None
        except BaseException:
            os.close(self._fd)
            raise
        # The number only serves the message above: on a full disk the lock holds without it.
        with suppress(OSError):
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Give the lock up. Closing, not LOCK_UN: in a forked child that would unlock the parent too."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _message(tree: Path, pid: str) -> str:
    if pid == str(os.getpid()):
        return f"the tree at {str(tree)!r} is open for writing in this process (pid {pid}): close that one first"
    holder = f"process {pid}" if pid.isdigit() else "another process"
    return (
        f'the tree at {str(tree)!r} is being written by {holder}: wait for it or end it, or open the tree with mode="r"'
    )
