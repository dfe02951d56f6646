"""The modules and parameters below a module, to see whether they are still the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import nn

from mc_kernels import extension
from mc_runtime.model.layers import RMSNorm

# What `ModuleTree.look` sees: all as it was; so, and a module has hooks; something has been replaced, added or removed.
SAME, HOOKED, OTHER = 0, 1, 2

_entry: Callable[[Mapping[str, Any], str], Any] = dict.get  # type: ignore[assignment]


class PlainTables:
    """What `WatchedTables` of the native library is (csrc/bindings_watch.h), where that is not built: no Python code
    runs for each of some thousand objects here either.

    What must stay the same: the classes of `objects`, the entries of `tables`, of each of `items` (a dict and a key)
    the value.
    """

    def __init__(
        self, objects: Sequence[object], tables: Sequence[dict[str, Any]], items: Sequence[tuple[dict[str, Any], str]],
        expected_empty: Sequence[dict[Any, Any]],
    ) -> None:  # fmt: skip
        self._objects, self._tables, self._expected_empty = objects, tables, expected_empty
        self._types = list(map(type, objects))
        self._sizes = list(map(len, tables))
        self._holders = [*(table for table in tables for _ in table), *(holder for holder, _ in items)]
        self._names = [*(name for table in tables for name in table), *(name for _, name in items)]
        self._items = list(map(_entry, self._holders, self._names))

    def look(self) -> int:
        same = (
            list(map(type, self._objects)) == self._types
            and list(map(len, self._tables)) == self._sizes
            and all(map(is_, map(_entry, self._holders, self._names), self._items))
        )
        if not same:
            return OTHER
        return HOOKED if any(self._expected_empty) else SAME


class ModuleTree:
    """The modules and parameters below a module, to be compared by identity. It is asked for at every decode step,
    when nothing of it is in the caches."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        modules = tuple(root.modules())
        tables = [t for m in modules for t in (m._modules, m._parameters)]
        numbers = [(vars(m), "eps") for m in modules if isinstance(m, RMSNorm)]
        hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        kind = PlainTables if extension.available() else extension.library().WatchedTables
        self._tables = kind(modules, tables, numbers, hooks)

    def look(self, root: nn.Module) -> int:
        """SAME, HOOKED or OTHER, of the module that `root` is now."""
        seen: int = self._tables.look() if root is self._root else OTHER
        return seen
