"""A model's own chat format, and the tokens that each part of a conversation adds to the context.

The template is the model's Jinja source, rendered in a sandbox. Control tokens that stand in a message are text: they
are replaced before rendering and put back, as text, when the pieces between the template's control tokens are encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mc_runtime.errors import ModelError
from mc_runtime.model.config import read_json
from mc_runtime.model.tokenizer import Tokenizer

Message = Mapping[str, str]
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content + '\n\n' }}{% else %}"
    "{{ ('User: ' if m.role == 'user' else 'Assistant: ') + m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_OPEN, _CLOSE = "\ue000", "\ue001"
_QUESTION, _ANSWER = "\ue002", "\ue003"
_ESCAPED = re.compile(f"{_OPEN}([0-9]*){_CLOSE}")


class ChatTemplate:
    """See the module.

    source: Jinja source; None gives a plain "User: ... Assistant:" format.
    special_tokens: names that the template may use (`bos_token`, `eos_token`) and their text.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str | None = None, *, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.source = source
        bos = tokenizer.decode(tokenizer.prefix_ids, special=True)
        self._names: dict[str, Any] = {"bos_token": bos, **(special_tokens or {})} if source else {"bos_token": bos}
        self._special = list(tokenizer.special_ids)
        try:
            self._template = _environment().from_string(source or PLAIN_TEMPLATE)
        except TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from error

    @classmethod
    def from_directory(cls, directory: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """`chat_template.jinja`, or the entry of tokenizer_config.json, or the plain format."""
        path = directory / "tokenizer_config.json"
        config = read_json(path) if path.is_file() else {}
        names = {name: _token_text(config[name]) for name in config if name.endswith("_token") and config[name]}
        return cls(tokenizer, _find_source(directory, config), special_tokens=names)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The conversation as the model's text. Raises `ModelError` when the template refuses the messages."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._names,
            )
        except TemplateError as error:
            raise ModelError(f"the model's chat template refuses these messages: {error}") from error
        except (TypeError, ValueError, KeyError) as error:
            raise ModelError(f"the model's chat template fails on these messages: {error}") from error

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Token ids of a whole conversation; control tokens only where the template puts them."""
        escaped = [{**message, "content": self._escape(message["content"])} for message in messages]
        return self._to_ids(self.render(escaped, add_generation_prompt))

    def system_ids(self, text: str | None = None) -> list[int]:
        """What stands before the first user turn: the start token and the system message.

        None: what the template puts there by itself. Where a template folds the system message into the user's turn
        or knows no system role, the text stands by itself before the first turn, followed by an empty line.
        """
        turn = self._user_turn(_QUESTION)
        question = {"role": "user", "content": _QUESTION}
        if text is not None:
            system = {"role": "system", "content": self._escape(text)}
            try:
                opened = self.render([system, question], add_generation_prompt=True)
            except ModelError:
                opened = ""
            if opened.endswith(turn):
                return self._to_ids(opened.removesuffix(turn))
        opened = self.render([question], add_generation_prompt=True)
        head = opened.removesuffix(turn) if opened.endswith(turn) else str(self._names["bos_token"])
        return self._to_ids(head + (self._escape(text) + "\n\n" if text is not None else ""))

    def user_turn_ids(self, text: str) -> list[int]:
        """A user's message up to where the model's answer begins, as it follows a finished answer."""
        return self._to_ids(self._user_turn(self._escape(text)))

    def system_turn_ids(self, text: str) -> list[int]:
        """A system message that comes later, between a finished answer and a user's message. Where the template
        refuses it there, or moves it, the text by itself, followed by an empty line."""
        escaped, end, turn = self._escape(text), self._answer_end(), self._user_turn(_QUESTION)
        messages = [("user", _QUESTION), ("assistant", _ANSWER), ("system", escaped), ("user", _QUESTION)]
        try:
            rendered = self.render([{"role": r, "content": c} for r, c in messages], add_generation_prompt=True)
            rest = self._after_answer(rendered)
        except ModelError:
            rest = ""
        if rest.startswith(end) and rest.endswith(turn):
            between = rest[len(end) : len(rest) - len(turn)]
            if escaped in between:
                return self._to_ids(between)
        return self._to_ids(escaped + "\n\n")

    def assistant_end_ids(self) -> list[int]:
        """What follows a finished answer, the end token included (which the model itself may have produced)."""
        return self._to_ids(self._answer_end())

    def _answer_end(self) -> str:
        question = {"role": "user", "content": _QUESTION}
        return self._after_answer(self.render([question, {"role": "assistant", "content": _ANSWER}]))

    def _user_turn(self, escaped: str) -> str:
        messages = [("user", _QUESTION), ("assistant", _ANSWER), ("user", escaped)]
        rendered = self.render([{"role": r, "content": c} for r, c in messages], add_generation_prompt=True)
        rest = self._after_answer(rendered)
        shared = zip(rest, self._answer_end(), strict=False)
        return rest[sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], shared)) :]

    @staticmethod
    def _after_answer(rendered: str) -> str:
        _, found, rest = rendered.partition(_ANSWER)
        if not found:
            raise ModelError("the model's chat template does not show the assistant's messages")
        return rest

    def _escape(self, text: str) -> str:
        """Control tokens, and the characters that this class uses for itself, as numbered private-use brackets."""
        marks = (_OPEN, _CLOSE, _QUESTION, _ANSWER)
        if any(mark in text for mark in marks):
            text = re.sub(f"[{_OPEN}-{_ANSWER}]", lambda m: f"{_OPEN}{marks.index(m[0])}{_CLOSE}", text)
        pieces = self.tokenizer.split_special(text)
        for i in range(1, len(pieces), 2):
            pieces[i] = f"{_OPEN}{len(marks) + self._special.index(pieces[i])}{_CLOSE}"
        return "".join(pieces)

    def _unescape(self, text: str) -> str:
        originals = (_OPEN, _CLOSE, _QUESTION, _ANSWER, *self._special)
        return _ESCAPED.sub(lambda m: originals[int(m[1])], text)

    def _to_ids(self, rendered: str) -> list[int]:
        ids: list[int] = []
        for i, piece in enumerate(self.tokenizer.split_special(rendered)):
            if i % 2:
                ids.append(self.tokenizer.special_ids[piece])
            elif piece:
                ids += self.tokenizer.encode(self._unescape(piece))
        return ids


def _environment() -> ImmutableSandboxedEnvironment:
    """The names that templates of the hub rely on, nothing else."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _find_source(directory: Path, config: Mapping[str, Any]) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return str(found) if found else None


def _token_text(value: Any) -> str:
    return str(value["content"] if isinstance(value, Mapping) else value)
