"""Which assembler Triton's kernels go through.

ptxas 12.8, which Triton 3.6 calls for Hopper, gets some 64-bit additions wrong in uniform registers: of a zero-extended
number plus a constant, the register of the low word is taken for the high word too. So are built the descriptors by
which wgmma finds its operands in shared memory: on an H100 products came out wrong, or the kernel read outside its
memory (the same PTX is right by ptxas 12.9 and 13.0). Triton 3.6 brings 12.9 along, for Blackwell.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

logger = logging.getLogger("mc_kernels")

ENV = "TRITON_PTXAS_PATH"
SOUND = (12, 9)


def version(tool: Any) -> tuple[int, ...]:
    """Of one of Triton's tools."""
    return tuple(int(part) for part in tool.version.split("."))


@functools.cache
def use_sound_assembler() -> str | None:
    """Let Triton call an assembler without that fault, in this process; to be asked before the first kernel of ours is
    compiled. Returns the path that was set, None where Triton's own is sound or the user has named one. Says so in the
    log where there is none.
    """
    import triton

    # Older and newer versions of Triton keep their tools elsewhere: 3.6 is the first of ours.
    tools = triton.knobs.nvidia
    if version(tools.ptxas) >= SOUND:
        return None
    other = getattr(tools, "ptxas_blackwell", None)
    if os.environ.get(ENV) or other is None or version(other) < SOUND:
        logger.warning(
            "Triton calls ptxas %s (%s), which miscompiles products on Hopper; %s can name a newer one (12.9 or later)",
            tools.ptxas.version, tools.ptxas.path, ENV,
        )  # fmt: skip
        return None
    os.environ[ENV] = other.path
    # What Triton may have remembered of the other one is part of the names of cached kernels.
    compiler = sys.modules.get("triton.backends.nvidia.compiler")
    for owner, name in ((compiler, "get_ptxas_version"), (getattr(compiler, "CUDABackend", None), "hash")):
        clear = getattr(getattr(owner, name, None), "cache_clear", None)
        if clear is not None:
            clear()
    logger.info("Triton's kernels are assembled by ptxas %s (%s)", other.version, other.path)
    path: str = other.path
    return path
