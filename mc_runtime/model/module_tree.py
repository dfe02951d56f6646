"""The modules and parameters below a module, to see whether they are still the same."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter, is_
from typing import Any

from torch import nn

from mc_runtime.model.layers import RMSNorm

_eps = attrgetter("eps")
_entry: Callable[[dict[str, Any], str], Any] = dict.get


class ModuleTree:
    """The modules and parameters below a module, to be compared by identity. It is asked for at every decode step,
    when nothing of it is in the caches: so no Python code runs for each of some thousand objects."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._modules = tuple(root.modules())
        self._types = list(map(type, self._modules))
        tables = [t for m in self._modules for t in (m._modules, m._parameters)]
        self._tables: list[dict[str, Any]] = tables
        self._sizes = list(map(len, tables))
        self._holders = [table for table in tables for _ in table]
        self._names = [name for table in tables for name in table]
        self._items = [x for table in tables for x in table.values()]
        self._norms = [m for m in self._modules if isinstance(m, RMSNorm)]
        self._eps = [m.eps for m in self._norms]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]

    def is_of(self, root: nn.Module) -> bool:
        return (
            root is self._root
            and list(map(type, self._modules)) == self._types
            and list(map(len, self._tables)) == self._sizes
            and all(map(is_, map(_entry, self._holders, self._names), self._items))
            and list(map(_eps, self._norms)) == self._eps
        )

    def hooked(self) -> bool:
        return any(self._hooks)
