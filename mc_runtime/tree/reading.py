"""Reading a tree: views of its files, bounded by what was committed."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mc_runtime.errors import InputError, TreeError
from mc_runtime.tree import checks
from mc_runtime.tree.catalogue import Snapshot
from mc_runtime.tree.documents import Document
from mc_runtime.tree.layout import Layout, kind_of
from mc_runtime.tree.spec import NodeFlag, TreeSpec
from mc_runtime.tree.storage import tree_errors


class TreeReads:
    """The reading half of `Tree`. Ranges that do not exist raise `InputError`, damaged files `TreeError`."""

    path: Path
    spec: TreeSpec
    _layout: Layout
    _snapshot: Snapshot
    _closed: bool

    @property
    def length(self) -> int:
        """Tokens committed."""
        return self._snapshot.length

    @property
    def n_levels(self) -> int:
        """Highest level that has a node, 0 when there is none."""
        return max((level for level, runs in self._snapshot.levels.items() if runs.count), default=0)

    def count(self, level: int) -> int:
        """Nodes committed at `level`; level 0 are the tokens."""
        return self._snapshot.count(level)

    def tokens(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint32]:
        """Ids of tokens [start, stop): uint32 `[n]`, a read-only view of the file."""
        start, stop = self._range(0, start, stop)
        with tree_errors(self.path, "read"):
            view = self._layout.tokens.read(start, stop).reshape(-1).view("<u4")
        view.flags.writeable = False
        return view

    def summaries(self, level: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Summaries of nodes [start, stop) of `level` >= 1: `[n, E]`, a view of the file, not to be written to."""
        start, stop = self._node_range(level, start, stop)
        return self._rows(level, "summary", start, stop, (self.spec.embed_dim,))

    def flags(self, level: int, start: int = 0, stop: int | None = None) -> npt.NDArray[np.uint8]:
        """`NodeFlag` bits of nodes [start, stop) of `level` >= 1: uint8 `[n]`, a copy."""
        start, stop = self._node_range(level, start, stop)
        runs = self._snapshot.levels.get(level)
        return runs.span(start, stop) if runs else np.empty(0, np.uint8)

    def hidden(self, level: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Hidden states of nodes [start, stop) of `level` >= 1: `[n, E]`.

        A view of the file, not to be written to, or a copy where fast and contextual nodes are mixed. Raises
        `InputError` when one of the nodes has no hidden state.
        """
        start, stop = self._node_range(level, start, stop)
        index = np.arange(start, stop)
        contextual = self._stored(level, index, NodeFlag.HIDDEN, "hidden state")
        shape = (self.spec.embed_dim,)
        if contextual.all() or not contextual.any():
            kind = kind_of("hidden", bool(contextual.all()))
            return self._rows(level, kind, start, stop, shape)
        return self._gather(level, "hidden", index, contextual, shape)

    def kv(self, level: int, index: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        """Keys and values of the nodes `index` [n], in any order: two contiguous copies `[n, L, Hkv, D]`.

        Raises `InputError` when a node does not exist or has no stored keys and values.
        """
        nodes = self._nodes(level, index)
        contextual = self._stored(level, nodes, NodeFlag.KV, "keys and values")
        shape = (2, *self.spec.kv_shape)
        k, v = (self._gather(level, "kv", nodes, contextual, shape, part) for part in (0, 1))
        return k, v

    def flags_at(self, level: int, index: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """`NodeFlag` bits of the nodes `index` [n] of `level` >= 1, in any order. Raises `InputError` when one does not
        exist."""
        nodes = self._nodes(level, index)
        return self._snapshot.levels[level].at(nodes) if nodes.size else np.empty(0, np.uint8)

    def documents(self, start: int = 0) -> list[Document]:
        """All documents that start at token `start` or later, in the order of their tokens."""
        return self._snapshot.documents.in_order(start)

    def documents_over(self, start: int, stop: int) -> list[Document]:
        """The documents that have tokens in [start, stop), in their order."""
        return self._snapshot.documents.over(start, stop)

    def count_documents(self, kind: str | None = None) -> int:
        """How many documents there are, of one kind if given."""
        documents = self._snapshot.documents
        return len(documents.by_id) if kind is None else documents.of_kind[kind]

    def document(self, id: int) -> Document:
        """The document with this id. Raises `InputError` when there is none."""
        document = self._snapshot.documents.by_id.get(id)
        if document is None:
            raise InputError(f"there is no document with id {id}; documents() lists those there are")
        return document

    def document_at(self, token: int) -> Document | None:
        """The document that token number `token` belongs to, None when it belongs to none."""
        document = self._snapshot.documents.last_before(token + 1)
        return document if document is not None and token < document.stop else None

    def state(self, key: str) -> bytes | None:
        """The blob that was committed under `key`, None when there is none."""
        return self._snapshot.state.get(key)

    def _require_open(self) -> None:
        if self._closed:
            raise TreeError(f"the tree at {str(self.path)!r} is closed: open it again")

    def _range(self, level: int, start: int, stop: int | None) -> tuple[int, int]:
        self._require_open()
        return checks.span(start, stop, self.count(level), f"nodes of level {level}" if level else "tokens")

    def _node_range(self, level: int, start: int, stop: int | None) -> tuple[int, int]:
        if level < 1:
            raise InputError(f"nodes have levels from 1 on, not {level}; tokens are read with tokens()")
        return self._range(level, start, stop)

    def _nodes(self, level: int, index: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """`index` as an array of nodes that exist."""
        self._node_range(level, 0, 0)
        nodes = checks.integers(index, "index").astype(np.int64)
        if nodes.size and not 0 <= nodes.min() <= nodes.max() < self.count(level):
            bad = nodes[(nodes < 0) | (nodes >= self.count(level))][0]
            raise InputError(f"node {bad} of level {level} does not exist: there are {self.count(level)}")
        return nodes

    def _stored(self, level: int, nodes: npt.NDArray[np.int64], flag: NodeFlag, what: str) -> npt.NDArray[np.bool_]:
        """Which of `nodes` are contextual; `InputError` unless all have `flag`."""
        if not nodes.size:
            return np.empty(0, np.bool_)
        flags = self._snapshot.levels[level].at(nodes)
        missing = (flags & flag) == 0
        if missing.any():
            raise InputError(f"node {nodes[missing.argmax()]} of level {level} has no stored {what}")
        return (flags & NodeFlag.CONTEXTUAL) != 0

    def _rows(self, level: int, kind: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
        """Rows [start, stop) of a file as `[n, *shape]`, a view."""
        with tree_errors(self.path, "read"):
            data = self._layout.level(level, kind).read(start, stop)
        return torch.from_numpy(data.reshape(-1)).view(self.spec.torch_dtype).view(stop - start, *shape)

    def _gather(
        self,
        level: int,
        base: str,
        nodes: npt.NDArray[np.int64],
        contextual: npt.NDArray[np.bool_],
        shape: tuple[int, ...],
        part: int | None = None,
    ) -> Tensor:
        """Rows `nodes` of the contextual and the fast file `base`, copied; only `[:, part]` of them if given."""

        def pick(kind: str, index: npt.NDArray[np.int64]) -> Tensor:
            rows = self._rows(level, kind, 0, int(index.max()) + 1, shape)
            return (rows if part is None else rows[:, part]).index_select(0, torch.from_numpy(index))

        if not nodes.size:
            return torch.empty((0, *(shape if part is None else shape[1:])), dtype=self.spec.torch_dtype)
        if contextual.all() or not contextual.any():
            return pick(kind_of(base, bool(contextual.all())), nodes)
        pieces = {flag: pick(kind_of(base, flag), nodes[contextual == flag]) for flag in (True, False)}
        result = torch.empty((len(nodes), *pieces[True].shape[1:]), dtype=self.spec.torch_dtype)
        for flag, piece in pieces.items():
            result[torch.from_numpy(contextual == flag)] = piece
        return result
