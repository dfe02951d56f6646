"""The MegaContext Tree: all tokens and gists of a history, on disk, append-only."""

from mc_runtime.tree.documents import Document
from mc_runtime.tree.spec import DTYPES, NodeFlag, TreeSpec
from mc_runtime.tree.transaction import Transaction
from mc_runtime.tree.tree import Tree

__all__ = ["DTYPES", "Document", "NodeFlag", "Transaction", "Tree", "TreeSpec"]
