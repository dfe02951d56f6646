"""The files of a tree, and how many rows of each a commit covers.

    tokens                 uint32, little-endian: one per token
    level<L>.summary       [E] per node
    level<L>.hidden        [E] per contextual node       level<L>.hidden.fast   the same of fast nodes
    level<L>.kv            [2, L, Hkv, D] per contextual node, keys then values, level<L>.kv.fast of fast nodes

Row i of every file is node i; rows that were never written are holes. Contextual and fast rows lie in separate
files because an upgrade must not write over a row that is in use: it fills holes, and the flag, which changes with
the commit, says which file counts. Snapshot readers go on reading the row that their flags name.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from mc_runtime.tree import storage
from mc_runtime.tree.arrays import ArrayFile
from mc_runtime.tree.flags import FlagRuns
from mc_runtime.tree.spec import NodeFlag, TreeSpec

LOCK = "lock"
CATALOGUE = "catalogue.sqlite"
TOKENS = "tokens"
_LEVEL_FILE = re.compile(r"level(\d+)\.(summary|(?:hidden|kv)(?:\.fast)?)")

# Kind of file -> which bits of the flags say that a row of it is in use, and their value.
_USED: dict[str, tuple[int, int]] = {
    "summary": (0, 0),
    "hidden": (NodeFlag.HIDDEN | NodeFlag.CONTEXTUAL, NodeFlag.HIDDEN | NodeFlag.CONTEXTUAL),
    "hidden.fast": (NodeFlag.HIDDEN | NodeFlag.CONTEXTUAL, NodeFlag.HIDDEN),
    "kv": (NodeFlag.KV | NodeFlag.CONTEXTUAL, NodeFlag.KV | NodeFlag.CONTEXTUAL),
    "kv.fast": (NodeFlag.KV | NodeFlag.CONTEXTUAL, NodeFlag.KV),
}


def is_tree_file(name: str) -> bool:
    """Whether a file of this name may lie in a tree's directory before the tree is complete."""
    return name in (LOCK, TOKENS) or name.startswith(CATALOGUE) or _LEVEL_FILE.fullmatch(name) is not None


def kind_of(base: str, contextual: bool) -> str:
    """Kind of the file that holds the rows `base` ("hidden" or "kv") of contextual or of fast nodes."""
    return base if contextual else f"{base}.fast"


class Layout:
    """All array files of the tree in directory `root`."""

    def __init__(self, root: Path, spec: TreeSpec, *, writable: bool) -> None:
        self._root = root
        self._writable = writable
        item = spec.torch_dtype.itemsize
        layers, heads, dim = spec.kv_shape
        self._row_bytes = {
            "summary": item * spec.embed_dim,
            "hidden": item * spec.embed_dim,
            "kv": item * 2 * layers * heads * dim,
        }
        self.tokens = ArrayFile(root / TOKENS, 4, writable=writable)
        self._levels: dict[tuple[int, str], ArrayFile] = {}

    def level(self, level: int, kind: str) -> ArrayFile:
        """The file of `kind` ("summary", "hidden", "kv", "hidden.fast", "kv.fast") of one level."""
        file = self._levels.get((level, kind))
        if file is None:
            path = self._root / f"level{level:02d}.{kind}"
            file = ArrayFile(path, self._row_bytes[kind.split(".")[0]], writable=self._writable)
            # setdefault: two reading threads must end up with the same file.
            file = self._levels.setdefault((level, kind), file)
        return file

    def check(self, length: int, levels: Mapping[int, FlagRuns]) -> None:
        """Raise `TreeError` when a file is shorter than these `length` tokens and nodes need."""
        self.tokens.check(length)
        for level, runs in levels.items():
            for kind, (mask, wanted) in _USED.items():
                self.level(level, kind).check(runs.extent(mask, wanted))

    def cut(self, length: int, levels: Mapping[int, FlagRuns]) -> None:
        """Cut every file, those not opened yet included, to what these `length` tokens and nodes need."""
        for path in self._root.iterdir():
            if match := _LEVEL_FILE.fullmatch(path.name):
                self.level(int(match[1]), match[2])
        self._cut_known(length, levels)

    def cut_back(self, length: int, levels: Mapping[int, FlagRuns]) -> None:
        """The same for the files in use, as far as the disk lets us: what cannot be cut now is cut on open."""
        with suppress(OSError):
            self._cut_known(length, levels)

    def _cut_known(self, length: int, levels: Mapping[int, FlagRuns]) -> None:
        self.tokens.cut(length)
        for (level, kind), file in list(self._levels.items()):
            runs = levels.get(level)
            file.cut(runs.extent(*_USED[kind]) if runs else 0)

    def sync(self) -> None:
        """Bring everything written, and the names of new files, to the device."""
        files = [self.tokens, *self._levels.values()]
        for file in files:
            file.sync()
        if any(file.created for file in files):
            storage.sync_directory(self._root)
            for file in files:
                file.created = False

    def close(self) -> None:
        """Close all files; arrays handed out stay readable."""
        for file in (self.tokens, *self._levels.values()):
            file.close()
