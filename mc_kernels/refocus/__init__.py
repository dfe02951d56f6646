"""Refocus without the host: scores to an edited cache, on the device alone."""

from .op import refocus_
from .state import GistStore, RefocusLists, RefocusRule, RefocusState

__all__ = ["GistStore", "RefocusLists", "RefocusRule", "RefocusState", "refocus_"]
