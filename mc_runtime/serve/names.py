"""From what a client calls its memory to a folder."""

from __future__ import annotations

import hashlib
import re

from .errors import ApiError

DEFAULT_NAME = "default"
MAX_NAME = 256


def memory_name(header: str | None, user: str | None) -> str:
    """The name that a request gives: its header's (a proxy may set it), else its user's, else the default.

    header: as HTTP libraries hand it over, in latin-1; read as UTF-8 where it is that.
    """
    if header is None:
        return user or DEFAULT_NAME
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return header


def folder_of(name: str, given_as: str = "user") -> str:
    """A folder's name for any text: letters and digits of it, for people, and 32 hex digits of its SHA-256, which tell
    all names apart, also on a file system that ignores case. It holds nothing that means anything in a path.

    given_as: the field or header that the error names.
    """
    if not name.strip() or len(name) > MAX_NAME:
        got = repr(name) if len(name) <= MAX_NAME else f"{len(name)}"
        text = f"{given_as}: expected 1 to {MAX_NAME} characters that are not all blank, got {got}"
        raise ApiError(400, text, param=given_as)
    try:
        digest = hashlib.sha256(name.encode("utf-8")).hexdigest()[:32]
    except UnicodeEncodeError:
        raise ApiError(400, f"{given_as}: expected valid Unicode", param=given_as) from None
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:32]
    return f"{readable or 'memory'}-{digest}"
