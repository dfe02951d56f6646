"""Finding or making the directory of a tree, and telling apart all that is not one."""

from pathlib import Path

from mc_runtime.errors import TreeError
from mc_runtime.tree import storage
from mc_runtime.tree.catalogue import Catalogue
from mc_runtime.tree.layout import CATALOGUE, LOCK, is_tree_file
from mc_runtime.tree.lock import WriterLock
from mc_runtime.tree.spec import TreeSpec


def open_catalogue(
    root: Path, create: TreeSpec | None, *, writable: bool, sync: bool
) -> tuple[Catalogue, WriterLock | None]:
    """The catalogue of the tree in `root` and, if `writable`, the writer's lock.

    With `create` a missing tree is made. Raises `TreeError`, and `OSError` or `sqlite3.Error` as the system does.
    """
    if not writable:
        if root.exists() and not root.is_dir():
            raise _not_a_directory(root)
        if not (root / CATALOGUE).exists():
            raise TreeError(f"there is no tree at {str(root)!r}: check the path")
        return Catalogue(root / CATALOGUE, writable=False), None
    _prepare(root, create, sync)
    lock = WriterLock(root / LOCK)
    try:
        made = not (root / CATALOGUE).exists()
        catalogue = Catalogue(root / CATALOGUE, writable=True, create=create, sync=sync)
        if made and sync:
            storage.sync_directory(root)
    except BaseException:
        lock.release()
        raise
    return catalogue, lock


def _prepare(root: Path, create: TreeSpec | None, sync: bool) -> None:
    if root.exists() and not root.is_dir():
        raise _not_a_directory(root)
    if (root / CATALOGUE).exists():
        return
    if root.exists():
        foreign = sorted(entry.name for entry in root.iterdir() if not is_tree_file(entry.name))
        if foreign:
            raise TreeError(
                f"{str(root)!r} holds {foreign[0]!r} and no tree: a tree needs a directory of its own, choose another"
            )
    if create is None:
        raise TreeError(f"there is no tree at {str(root)!r}: check the path, or create one by giving a TreeSpec")
    if not root.exists():
        root.mkdir(parents=True, exist_ok=True)
        if sync:
            storage.sync_directory(root.absolute().parent)


def _not_a_directory(root: Path) -> TreeError:
    return TreeError(f"{str(root)!r} is a file, and a tree is a directory: choose another path")
