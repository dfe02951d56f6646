"""Text from files and users as a terminal may show it."""

from __future__ import annotations

import re

# Control characters (C0, DEL, C1), what reorders or breaks a line of text, and halves of surrogate pairs. Joiners,
# which scripts and emoji need, stay.
_STEERING = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def printable(text: str, keep: str = "") -> str:
    """The text with characters that would steer a terminal, or end the line, as Python writes them (`\\x1b`, `\\n`).

    keep: those that are left as they are.
    """
    return _STEERING.sub(lambda match: match[0] if match[0] in keep else _escaped(match), text)
