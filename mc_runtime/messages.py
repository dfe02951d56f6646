"""A conversation that was held elsewhere, as the tokens that its turns would have left in a memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .errors import InputError
from .model import LoadedModel
from .sources import Source

ROLES = ("system", "user", "assistant")


def message_parts(
    messages: Sequence[Mapping[str, str]], model: LoadedModel, first_turn: int
) -> list[tuple[Source, str]]:
    """Token ids and kind of document of each message, and of what is missing between them: every question is followed
    by an answer, if an empty one, and every answer follows a question. first_turn: number of the first turn."""
    parts: list[tuple[Source, str]] = []
    number, waiting = first_turn - 1, False

    def add(ids: Sequence[int], kind: str) -> None:
        title = f"{kind}, turn {number}" if kind != "system" else "system message"
        parts.append((Source(np.asarray(ids, np.int64), title, None), kind))

    if not isinstance(messages, Sequence):
        raise InputError(f"messages: expected a list of mappings, got {type(messages).__name__}")
    chat, end = model.chat, model.chat.assistant_end_ids()
    for at, message in enumerate(messages):
        role, text = _read(message, at)
        if role != "assistant" and waiting:
            add(end, "assistant")
        if role == "user" or (role == "assistant" and not waiting):
            number += 1
            add(chat.user_turn_ids(text if role == "user" else ""), "user")
        if role == "assistant":
            add(model.tokenizer.encode(text) + end, "assistant")
        elif role == "system":
            add(chat.system_turn_ids(text), "system")
        waiting = role == "user"
    if waiting:
        add(end, "assistant")
    return parts


def _read(message: Mapping[str, str], at: int) -> tuple[str, str]:
    role = message.get("role") if isinstance(message, Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    if role not in ROLES or not isinstance(text, str):
        expected = f"a mapping with `role` ({', '.join(ROLES)}) and `content`, which is text"
        raise InputError(f"messages[{at}]: expected {expected}, got {message!r}")
    return role, text
