"""`python bench/run.py e2e`."""

from __future__ import annotations


def e2e() -> None:
    """The whole loop."""
    raise NotImplementedError
