"""Is the time per decoded token flat? Memories of very different length, and rivals, decoding in alternation.

In alternation, because a machine's speed drifts: what stands in one table was measured side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bench.e2e.memories import MemoryRun
from bench.e2e.transformers_window import TransformersWindow


def decode_in_turn(
    memories: Sequence[MemoryRun],
    windows: Sequence[TransformersWindow],
    steps: int,
    progress: Callable[[int], None],
) -> None:
    """Decode `steps` tokens with each, one after the other, again and again; a window that is full sits out.
    progress: tokens done by each memory."""
    if steps < 1 or not memories:
        raise ValueError(f"expected a memory and at least 1 step, got {len(memories)} memories and {steps} steps")
    done = 0
    while done < steps:
        for memory in memories:
            if memory.decoded < steps:
                memory.step()
        for window in windows:
            if len(window.decode) < steps:
                window.step()
        done = min(memory.decoded for memory in memories)
        progress(min(done, steps))
