"""Memory that a training step frees, kept for the next one.

glibc gives large blocks back to the system at once, and a step asks for hundreds of them again: a fault for each page,
which was a fifth of the time of a step on a CPU.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, from now on. Returns whether its allocator knows how (glibc's does)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator, or a system without one to ask
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
