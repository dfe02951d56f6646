"""Focus: which parts of the history stand in the Working Context in what detail."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mc_runtime.errors import InputError

from .attention import AttentionPolicy
from .blend import BlendPolicy
from .hindsight import HindsightPolicy
from .lensnet import LensNetPolicy
from .oracle import OraclePolicy
from .recency import RecencyPolicy
from .retrieval import RetrievalPolicy
from .view import FocusPolicy, FocusView, Utilities

if TYPE_CHECKING:
    from mc_runtime.lensnet import LensNet

__all__ = [
    "LENSNET_POLICIES",
    "POLICIES",
    "AttentionPolicy",
    "BlendPolicy",
    "FocusPolicy",
    "FocusView",
    "HindsightPolicy",
    "LensNetPolicy",
    "OraclePolicy",
    "RecencyPolicy",
    "RetrievalPolicy",
    "Utilities",
    "make_policy",
]

# Policies that need nothing but a name.
POLICIES: dict[str, Callable[[], FocusPolicy]] = {
    "retrieval": RetrievalPolicy,
    "blend": BlendPolicy.default,
    "attention": AttentionPolicy,
    "recency": RecencyPolicy,
    "retrieval+recency": BlendPolicy.reading,
    "hindsight": HindsightPolicy,
}


# Policies that need trained weights too.
LENSNET_POLICIES: dict[str, Callable[[LensNet], FocusPolicy]] = {
    "lensnet": LensNetPolicy,
    # What only one of the two finds stays closed while the other is sure: opened in vain, it costs answers.
    "lensnet+retrieval": lambda net: BlendPolicy([(1.0, LensNetPolicy(net)), (1.0, RetrievalPolicy())], nearly=0.5),
}


def make_policy(name: str, lensnet: LensNet | None = None) -> FocusPolicy:
    """A policy by name; `lensnet` is for those of `LENSNET_POLICIES`. Raises InputError for a name that is not known,
    and for one of these without weights."""
    if name in LENSNET_POLICIES:
        if lensnet is None:
            raise InputError(f"policy: {name} needs trained weights; give lensnet=path of a safetensors file")
        return LENSNET_POLICIES[name](lensnet)
    if name not in POLICIES:
        raise InputError(f"policy: expected one of {', '.join((*POLICIES, *LENSNET_POLICIES))}, got {name!r}")
    return POLICIES[name]()
