"""What the messages of a request mean to a memory that may hold most of them.

Chat clients send the whole conversation every time. What the memory holds is not read again, wherever it stands there:
a question counts as held if its tokens are the same and the remembered answer begins with the one that was sent (a
client may have seen less of it: a stop string, a stream that it left). Each remembered turn stands for one of the
request's. What is not held (an edited message, a conversation from elsewhere) is read in order. The last question is
always a new turn. Nothing is taken back: of an edited message both versions are remembered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..model import LoadedModel
from ..tree import Document, Tree
from .schema import Message

# Questions of which a memory keeps the digests that it has computed: 4 MB.
MAX_ASKED = 20_000


@dataclass(frozen=True)
class Turn:
    """A question and its answer, of which one may be missing."""

    question: str | None
    answer: str | None

    def messages(self) -> list[dict[str, str]]:
        given = (("user", self.question), ("assistant", self.answer))
        return [{"role": role, "content": text} for role, text in given if text is not None]


@dataclass(frozen=True)
class Conversation:
    """instructions: the system and developer messages of a request, joined; None if there are none. past: its finished
    turns. question: its last message."""

    instructions: str | None
    past: list[Turn]
    question: str

    @classmethod
    def of(cls, messages: Sequence[Message]) -> Conversation:
        system = [m.text for m in messages if m.role in ("system", "developer")]
        past: list[Turn] = []
        asked: str | None = None
        for message in messages[:-1]:
            if message.role == "user":
                if asked is not None:
                    past.append(Turn(asked, None))
                asked = message.text
            elif message.role == "assistant":
                past.append(Turn(asked, message.text))
                asked = None
        if asked is not None:
            past.append(Turn(asked, None))
        return cls("\n\n".join(system) if system else None, past, messages[-1].text)


@dataclass
class Held:
    """A remembered turn: the digest of its question's tokens, and the documents."""

    sha256: str
    question: Document
    answer: Document | None = None
    text: str | None = None  # of the answer, once it has been needed

    @property
    def tokens(self) -> int:
        stop = self.question.stop if self.answer is None else self.answer.stop
        return stop - self.question.start


@dataclass
class Reading:
    """What a request adds to a memory. new: turns to be read before the question. read: their tokens and the
    question's. total: tokens of all messages, held or not."""

    new: list[Turn] = field(default_factory=list)
    read: int = 0
    total: int = 0


class History:
    """The turns that a memory's tree holds. Not safe for use from several threads at once."""

    def __init__(self, tree: Tree, model: LoadedModel) -> None:
        self.tree, self.model = tree, model
        self.turns: list[Held] = []
        self.systems: dict[str, Document] = {}
        self._by_question: dict[str, list[int]] = {}
        self._asked: dict[bytes, tuple[str, int]] = {}
        self._known = 0
        self._end = model.chat.assistant_end_ids()
        self.update()

    def update(self) -> None:
        """Take up what was remembered since the last call."""
        for document in self.tree.documents(self._known):
            if document.kind == "system":
                self.systems[document.sha256] = document
            elif document.kind == "user":
                self._by_question.setdefault(document.sha256, []).append(len(self.turns))
                self.turns.append(Held(document.sha256, document))
            elif document.kind == "assistant" and self.turns and self.turns[-1].question.stop == document.start:
                self.turns[-1].answer = document
        self._known = self.tree.length

    def reading(self, conversation: Conversation) -> Reading:
        """What has to be read for a conversation, its instructions aside."""
        result, used = Reading(), set[int]()
        left: dict[str, list[int]] = {}
        past = conversation.past
        for number, turn in enumerate(past):
            at = self._find(turn, past[number + 1] if number + 1 < len(past) else None, used, left)
            if at is not None:
                used.add(at)
                result.total += self.turns[at].tokens
                continue
            result.new.append(turn)
            answer = self.model.tokenizer.encode(turn.answer or "")
            count = self._question(turn.question or "")[1] + len(answer) + len(self._end)
            result.total, result.read = result.total + count, result.read + count
        count = self._question(conversation.question)[1]
        result.total, result.read = result.total + count, result.read + count
        return result

    def _find(self, turn: Turn, following: Turn | None, used: set[int], left: dict[str, list[int]]) -> int | None:
        """The newest remembered turn that stands for `turn` and for none before. Of an answer without its question
        (the client has dropped it) the neighbours are looked at, newest first: those before `following`.

        left: by question, what is not used; so a question that came a thousand times costs no thousand looks each.
        """
        if turn.question is not None:
            digest = self._question(turn.question)[0]
            candidates = left.setdefault(digest, list(self._by_question.get(digest, ())))
        elif following is not None and following.question is not None:
            after = self._by_question.get(self._question(following.question)[0], [])
            candidates = [at - 1 for at in after if at]
        else:
            candidates = [len(self.turns) - 1] if self.turns else []
        answer = (turn.answer or "").strip()
        for place in range(len(candidates) - 1, -1, -1):
            at = candidates[place]
            if at not in used and self._text(at).startswith(answer):
                del candidates[place]
                return at
        return None

    def _question(self, text: str) -> tuple[str, int]:
        """Digest and number of a question's tokens. Kept: a client sends the same ones again, and the template takes
        longer than all else."""
        key = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        if key not in self._asked:
            if len(self._asked) >= MAX_ASKED:
                self._asked.clear()
            ids = self.model.chat.user_turn_ids(text)
            self._asked[key] = self._digest(ids), len(ids)
        return self._asked[key]

    def _text(self, at: int) -> str:
        held = self.turns[at]
        if held.text is None:
            document = held.answer
            ids = [] if document is None else self.tree.tokens(document.start, document.stop).tolist()
            if ids[len(ids) - len(self._end) :] == self._end:
                ids = ids[: len(ids) - len(self._end)]
            held.text = self.model.tokenizer.decode(ids).strip()
        return held.text

    # -- instructions -----------------------------------------------------------------------------------------------

    def instructions(self, text: str) -> Document | None:
        """The system message of this text, where the memory holds it: at its head or later."""
        chat = self.model.chat
        for ids in (chat.system_ids(text), chat.system_turn_ids(text)):
            found = self.systems.get(self._digest(ids))
            if found is not None:
                return found
        return None

    @staticmethod
    def _digest(ids: Sequence[int]) -> str:
        """As the tree computes it of a document's tokens."""
        return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()
