"""What this process and a directory take: memory and disk."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")


def resident_memory() -> dict[str, int]:
    """Bytes: `anonymous` memory, which is the process's own, and pages of mapped `files`, which the system may take
    back at any time. Empty where the system does not say."""
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc keeps what was freed, unless told to give it back
        ctypes.CDLL(None).malloc_trim(0)
    if not STATUS.exists():
        return {}
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
    return {
        name: int(fields[field].split()[0]) << 10
        for name, field in (("anonymous", "RssAnon"), ("files", "RssFile"))
        if field in fields
    }


def disk_usage(directory: Path) -> int:
    """Bytes that the files below a directory really take: holes are not counted."""
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
