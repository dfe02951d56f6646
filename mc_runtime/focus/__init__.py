"""Focus: which parts of the history stand in the Working Context in what detail."""

from __future__ import annotations

from collections.abc import Callable

from mc_runtime.errors import InputError

from .attention import AttentionPolicy
from .blend import BlendPolicy
from .oracle import OraclePolicy
from .recency import RecencyPolicy
from .retrieval import RetrievalPolicy
from .view import FocusPolicy, FocusView, Utilities

__all__ = [
    "POLICIES",
    "AttentionPolicy",
    "BlendPolicy",
    "FocusPolicy",
    "FocusView",
    "OraclePolicy",
    "RecencyPolicy",
    "RetrievalPolicy",
    "Utilities",
    "make_policy",
]

# Policies that need nothing but a name.
POLICIES: dict[str, Callable[[], FocusPolicy]] = {
    "blend": BlendPolicy.default,
    "retrieval": RetrievalPolicy,
    "attention": AttentionPolicy,
    "recency": RecencyPolicy,
}


def make_policy(name: str) -> FocusPolicy:
    """A policy by name. Raises InputError for a name that is not known."""
    if name not in POLICIES:
        raise InputError(f"policy: expected one of {', '.join(POLICIES)}, got {name!r}")
    return POLICIES[name]()
