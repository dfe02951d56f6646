"""How nodes come to be: complete blocks of tokens become level-1 nodes, K complete siblings their parent, and so on.

Token ids and nodes go into one transaction of the tree, so that a tree never holds a node without its tokens. Each
level keeps its incomplete sibling group in memory (fewer than K nodes), read back from the tree at the start.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gistnet import GistNet
from .tree import NodeFlag, Transaction, Tree


@dataclass(frozen=True)
class Nodes:
    """n neighbouring nodes of one level.

    summary [n, E]; hidden [n, E] or None; k, v [n, L, Hkv, D] or None, keys unrotated. All three come from contextual
    ingest or none does.
    """

    summary: Tensor
    hidden: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None

    @property
    def contextual(self) -> bool:
        return self.k is not None

    def __len__(self) -> int:
        return len(self.summary)

    def __getitem__(self, span: slice) -> Nodes:
        return self._map(lambda x: x[span])

    def to_stored(self, dtype: torch.dtype) -> Nodes:
        """Rounded as the tree stores them: parents are computed from what a later start will read back."""
        return self._map(lambda x: x.detach().to("cpu", dtype))

    def to(self, device: torch.device) -> Nodes:
        return self._map(lambda x: x.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Nodes:
        rest = (None if x is None else change(x) for x in (self.hidden, self.k, self.v))
        return Nodes(change(self.summary), *rest)


def _join(parts: list[Nodes]) -> Nodes:
    """Contextual only if every part is: a parent cannot pool keys that one of its children lacks."""

    def cat(tensors: list[Tensor | None]) -> Tensor | None:
        present = [t for t in tensors if t is not None]
        return torch.cat(present) if len(present) == len(tensors) else None

    return Nodes(
        torch.cat([p.summary for p in parts]),
        cat([p.hidden for p in parts]),
        cat([p.k for p in parts]),
        cat([p.v for p in parts]),
    )


class NodeBuilder:
    """Builds the levels above 1 while level-1 nodes arrive. One builder serves one writer of one tree."""

    def __init__(self, tree: Tree, net: GistNet) -> None:
        self.tree, self.net = tree, net
        self.block_size = tree.spec.block_size
        self.dtype: torch.dtype = getattr(torch, tree.spec.dtype)
        self._open: dict[int, list[Nodes]] = {}
        self.reload()

    def reload(self) -> None:
        """Read the incomplete sibling group of every level from the committed tree (also after a roll-back)."""
        self._open = {}
        for level in range(1, self.tree.n_levels + 1):
            count = self.tree.count(level)
            first = count - count % self.block_size
            self._open[level] = [self._read(level, i) for i in range(first, count)]

    def _read(self, level: int, index: int) -> Nodes:
        flags = int(self.tree.flags(level, index, index + 1)[0])
        summary = self.tree.summaries(level, index, index + 1).clone()
        if not flags & NodeFlag.KV:
            return Nodes(summary)
        k, v = self.tree.kv(level, [index])
        hidden = self.tree.hidden(level, index, index + 1).clone() if flags & NodeFlag.HIDDEN else None
        return Nodes(summary, hidden, k, v)

    def push(self, transaction: Transaction, nodes: Nodes, level: int = 1) -> None:
        """Append neighbouring nodes to `level` and every parent that they complete."""
        nodes = nodes.to_stored(self.dtype)
        transaction.append_nodes(
            level, nodes.summary, hidden=nodes.hidden, k=nodes.k, v=nodes.v, contextual=nodes.contextual
        )
        group = self._open.setdefault(level, [])
        have = sum(len(part) for part in group)
        taken = 0
        parents: list[Nodes] = []
        while have + len(nodes) - taken >= self.block_size:
            step = self.block_size - have
            group.append(nodes[taken : taken + step])
            parents.append(self._parent(_join(group), level + 1))
            group.clear()
            taken, have = taken + step, 0
        if taken < len(nodes):
            group.append(nodes[taken:])
        # Unlike parents are pushed apart: joining them would drop the keys or hidden states that only some have.
        for _, alike in itertools.groupby(parents, key=lambda parent: (parent.contextual, parent.hidden is None)):
            self.push(transaction, _join(list(alike)), level + 1)

    def _parent(self, children: Nodes, level: int) -> Nodes:
        children = children.to(self.net.encode_weights.mu.device)  # they stand as they are stored, on the CPU
        summary = self.net.encode(children.summary[None], level=level)
        if children.k is None or children.v is None:
            return Nodes(summary)
        # [K, L, Hkv, D] -> [L, Hkv, 1, K, D]
        k, v = (x.permute(1, 2, 0, 3).unsqueeze(2) for x in (children.k, children.v))
        k_gist, v_gist = self.net.pool(k, v, level=level)
        hidden = None if children.hidden is None else children.hidden.float().mean(0, keepdim=True)
        return Nodes(summary, hidden, k_gist.permute(2, 0, 1, 3), v_gist.permute(2, 0, 1, 3))
