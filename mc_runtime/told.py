"""What of a history is told: text that was read and what the user stated, as against questions and answers.

A question repeats the words of what answers it, and an answer those of the question; neither says anything new. What a
user states in passing ("the boiler is set to 60 now") does, though it stands among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from .model import Tokenizer
from .tree import Document, Tree

# Tokens decoded beyond a span's ends, so that a word that straddles them is whole.
OVERLAP = 4
# Prompts whose statements are kept in memory.
MAX_PROMPTS = 4096
_SENTENCES = re.compile(r"[^.!?\u061f\u3002\uff01\uff1f\n]+[.!?\u061f\u3002\uff01\uff1f\n]*")
_QUESTION_MARKS = "?\u061f\uff1f"


def statements(text: str) -> str:
    """The sentences of a text that do not end in a question mark."""
    sentences: list[str] = _SENTENCES.findall(text)
    return " ".join(s for s in sentences if not any(mark in s for mark in _QUESTION_MARKS))


class ToldWords:
    """stems: of each text, the stems of its words."""

    def __init__(self, tree: Tree, tokenizer: Tokenizer, stems: Callable[[Sequence[str]], list[list[str]]]) -> None:
        self._tree, self._tokenizer, self._stems = tree, tokenizer, stems
        self._stated: dict[int, frozenset[str]] = {}  # by the first token of the prompt

    def of(self, first: int, stop: int) -> frozenset[str]:
        """Stems of what is told in the tokens [first, stop), which may reach beyond the history."""
        found: set[str] = set()
        at, stop = max(first, 0), min(stop, self._tree.length)
        while at < stop:
            document = self._tree.document_at(at)
            if document is None:
                break
            if document.kind != "assistant":
                part = self._words(max(document.start, first - OVERLAP), min(document.stop, stop + OVERLAP))
                found |= part & self._statements(document) if document.kind == "user" else part
            at = document.stop
        return frozenset(found)

    def _words(self, start: int, stop: int) -> frozenset[str]:
        return frozenset(self._stems([self._tokenizer.decode(self._tree.tokens(start, stop).tolist())])[0])

    def _statements(self, document: Document) -> frozenset[str]:
        if document.start not in self._stated:
            if len(self._stated) >= MAX_PROMPTS:
                self._stated.clear()
            text = self._tokenizer.decode(self._tree.tokens(document.start, document.stop).tolist())
            self._stated[document.start] = frozenset(self._stems([statements(text)])[0])
        return self._stated[document.start]
