"""Reads in Triton's GPU dialect whether a loop overwrites a buffer that the tensor cores may still be reading.

On Hopper a product of tiles in shared memory runs on while the loop goes on. Where Triton leaves it pending across the
end of an iteration, a tile that is loaded D iterations ahead needs D + 1 buffers; Triton 3.6 gives D to a tile that is
also read into registers (its issue 6691), and the copy for iteration i + D then lands in what iteration i multiplies.
"""

from __future__ import annotations

import re

_ALLOCATION = re.compile(r"%(\S+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"%(\S+) = ttg\.memdesc_(?:index|trans|reshape|subslice|subview)\w* %([\w#]+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local \S+, %([\w#]+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot ([^:{]*)\{")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """First and last line of every innermost loop."""
    found, opened = [], []
    for at, line in enumerate(lines):
        if "scf.for" in line:
            opened.append((at, len(line) - len(line.lstrip())))
        elif opened and line.strip() == "}" and len(line) - len(line.lstrip()) == opened[-1][1]:
            found.append((opened.pop()[0], at))
    return [one for one in found if not any(one[0] < other[0] < one[1] for other in found)]


def overwritten_tiles(ttgir: str) -> list[str]:
    """Names of the buffers for which that can happen."""
    lines = [re.sub(r" loc\(.*", "", line) for line in ttgir.splitlines()]
    buffers: dict[str, int] = {}
    view_of: dict[str, str] = {}
    for line in lines:
        if match := _ALLOCATION.search(line):
            buffers[match[1]] = int(match[2])
        if match := _VIEW.search(line):
            view_of[match[1]] = match[2]

    def base(name: str) -> str:
        while name in view_of:
            name = view_of[name]
        return name

    found = []
    for first, last in _loops(lines):
        body = lines[first:last]
        pending = [int(match[1]) for line in body if (match := _WAIT.search(line))]
        if not pending or max(pending) == 0:
            continue
        for line in body:
            for name in re.findall(r"%([\w#]+)", match[1]) if (match := _PRODUCT.search(line)) else ():
                tile = base(name)
                ahead = sum(1 for x in lines[:first] if (match := _COPY.search(x)) and base(match[1]) == tile)
                if tile in buffers and buffers[tile] <= ahead:
                    found.append(tile)
    return sorted(set(found))
