"""Errors that a user can act on.

Every message is one line, says what is wrong and what to do about it. The CLI prints the message and exits with
code 2; anything that is not a `MegaContextError` is a bug and keeps its traceback.
"""


class MegaContextError(Exception):
    """Base class: something that the caller, not the package, has to mend."""


class InputError(MegaContextError, ValueError):
    """A value that was handed in cannot be used: empty or binary text, ids out of range, non-finite embeddings."""


class TreeError(MegaContextError):
    """The tree on disk cannot be used as asked."""


class TreeMismatchError(TreeError):
    """The tree was written by another model, tokenizer, GistNet or block size."""


class TreeLockedError(TreeError):
    """Another process is writing to the tree."""


class StorageFullError(TreeError):
    """The disk is full; what was being written has been rolled back."""


class BudgetError(MegaContextError, ValueError):
    """The budget cannot hold what must be in the Working Context."""


class ModelError(MegaContextError):
    """A model cannot be found, read or run."""
