"""Memory that a training step frees, kept for the next one.

glibc gives large blocks back to the system at once, and a step asks for hundreds of them again: a fault for each page,
which was a fifth of the time of a step on a CPU. But a heap that never shrinks gets holes of ever other sizes: two
processes on 24 GB grew to 10 GB each within half an hour. So what lies free is given back once in a while.
"""

from __future__ import annotations

import ctypes

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, from now on. Returns whether its allocator knows how (glibc's does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator, or a system without one to ask
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def give_back_freed_memory() -> None:
    """Give the system what this process has freed and kept. glibc's allocator does, from the middle of its heap too;
    with another one nothing happens."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
