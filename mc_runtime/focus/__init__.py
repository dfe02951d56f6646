"""Focus: which parts of the history stand in the Working Context in what detail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mc_runtime.errors import InputError

from .attention import AttentionPolicy
from .blend import BlendPolicy
from .lensnet import LensNetPolicy
from .oracle import OraclePolicy
from .recency import RecencyPolicy
from .retrieval import RetrievalPolicy
from .view import FocusPolicy, FocusView, Utilities

if TYPE_CHECKING:
    from mc_runtime.lensnet import LensNet

__all__ = [
    "POLICIES",
    "AttentionPolicy",
    "BlendPolicy",
    "FocusPolicy",
    "FocusView",
    "LensNetPolicy",
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


def make_policy(name: str, lensnet: LensNet | None = None) -> FocusPolicy:
    """A policy by name; `lensnet` is the one that needs trained weights. Raises InputError for a name that is not
    known, and for `lensnet` without weights."""
    if name == "lensnet":
        if lensnet is None:
            raise InputError("policy: lensnet needs trained weights; give lensnet=path of a safetensors file")
        return LensNetPolicy(lensnet)
    if name not in POLICIES:
        raise InputError(f"policy: expected one of {', '.join(POLICIES)}, lensnet, got {name!r}")
    return POLICIES[name]()
