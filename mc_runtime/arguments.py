"""What callers hand to a session, checked before anything is touched."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InputError
from .retrieval import Hit
from .tree import Document

Span = tuple[int, int] | Document | Hit
# What `Document.kind` is in a memory.
KINDS = ("document", "evidence", "user", "assistant", "system")


def read_prompts(prompt: object) -> list[str]:
    """One text or several. Raises InputError for anything else, and for texts that are empty."""
    several = isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes | Mapping)
    prompts: list[Any] = [*prompt] if several else [prompt]  # type: ignore[misc]
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        got = f", got {type(prompt).__name__}" if not isinstance(prompt, str | list) else ""
        raise InputError(f"prompt: expected text, or a list of texts, that are not empty{got}")
    return prompts


def read_span(target: Span, length: int) -> tuple[int, int]:
    """First token and end of a span of a history of `length` tokens. Raises InputError for one outside it, and for
    what is no span."""
    given = (target.start, target.stop) if isinstance(target, Document | Hit) else target
    try:
        start, stop = map(operator.index, given)
    except (TypeError, ValueError):
        expected = "two integers (start, stop), a document or a hit"
        raise InputError(f"span: expected {expected}, got {target!r}") from None
    if not 0 <= start < stop <= length:
        raise InputError(f"span: expected 0 <= start < stop <= {length}, got ({start}, {stop})")
    return start, stop


def read_search(text: object, top: object, kinds: object) -> tuple[str, int, frozenset[str] | None]:
    """What to search for, how many hits, and the kinds of documents to search in; None: all."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"text: expected words to search for, got {text!r}")
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise InputError(f"top: expected an integer of at least 1, got {top!r}")
    if kinds is None:
        return text, top, None
    given = [*kinds] if isinstance(kinds, Iterable) and not isinstance(kinds, str | bytes) else []
    if not given or not all(kind in KINDS for kind in given):
        raise InputError(f"kinds: expected some of {', '.join(KINDS)}, in a list, got {kinds!r}")
    return text, top, frozenset(given)
