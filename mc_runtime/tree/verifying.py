"""What must hold for every tree, however its writers ended."""

import hashlib
from typing import TYPE_CHECKING

from mc_runtime.errors import TreeError
from mc_runtime.tree.opening import open_catalogue
from mc_runtime.tree.storage import tree_errors

if TYPE_CHECKING:
    from mc_runtime.tree.tree import Tree


def verify(tree: "Tree") -> None:
    """Raise `TreeError` naming the first thing that is wrong: catalogue, file sizes, counts, documents, hashes."""
    snapshot, layout = tree._snapshot, tree._layout
    with tree_errors(tree.path, "read"):
        catalogue, _ = open_catalogue(tree.path, None, writable=False, sync=False)
        try:
            catalogue.check()
        finally:
            catalogue.close()
        layout.check(snapshot.length, snapshot.levels)
    for level in sorted(snapshot.levels):
        count, children = snapshot.count(level), snapshot.count(level - 1)
        if count > children // tree.spec.block_size:
            raise _damaged(tree, f"{count} nodes of level {level} stand over {children} children")
    end, before = 0, 0
    for document in snapshot.documents.in_order():
        if not 0 <= document.start <= document.stop <= snapshot.length:
            raise _damaged(tree, f"document {document.id} spans {document.start} to {document.stop}")
        if document.stop > document.start:
            if document.start < end:
                raise _damaged(tree, f"documents {before} and {document.id} overlap")
            end, before = document.stop, document.id
        if hashlib.sha256(tree.tokens(document.start, document.stop).data).hexdigest() != document.sha256:
            raise _damaged(tree, f"the tokens of document {document.id} are not those that were written")


def _damaged(tree: "Tree", what: str) -> TreeError:
    return TreeError(f"the tree at {str(tree.path)!r} is damaged: {what}; restore a backup")
