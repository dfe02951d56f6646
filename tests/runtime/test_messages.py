"""Conversations that were held elsewhere, and how a turn says that it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import refused, words
from tiny import tiny_tokenizer

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.model import ChatTemplate, LoadedModel

Memory = Callable[..., Session]


def shown(session: Session, model: LoadedModel) -> str:
    return model.tokenizer.decode(session.tree.tokens().tolist(), special=True)


def test_a_conversation_reads_as_if_it_had_been_held_here(memory: Memory, model: LoadedModel) -> None:
    session, exchanges = memory(), []
    for question in ("one?", words(60), "three?"):
        exchanges.append({"role": "user", "content": question})
        exchanges.append({"role": "assistant", "content": f"answer to {question}"})
    documents = session.ingest_messages(exchanges)
    assert [(d.kind, d.title) for d in documents] == [
        (kind, f"{kind}, turn {n}") for n in (1, 2, 3) for kind in ("user", "assistant")
    ]
    whole = [{"role": "system", "content": "be brief"}, *exchanges]
    assert session.tree.tokens().tolist() == model.chat.encode(whole)
    session.tree.verify()
    session.generate("four?", max_new_tokens=2)
    assert session.tree.documents()[-1].title == "assistant, turn 4"


def test_what_is_missing_between_messages_is_empty(memory: Memory, model: LoadedModel) -> None:
    session = memory()
    roles = ("assistant", "user", "user", "assistant", "assistant", "user", "system")
    session.ingest_messages([{"role": role, "content": f"<{n}>"} for n, role in enumerate(roles)])
    parts = [("user", ""), ("assistant", "<0>"), ("user", "<1>"), ("assistant", ""), ("user", "<2>")]
    parts += [("assistant", "<3>"), ("user", ""), ("assistant", "<4>"), ("user", "<5>"), ("assistant", "")]
    parts = [("system", "be brief"), *parts, ("system", "<6>")]
    assert shown(session, model) == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in parts)
    assert [d.kind for d in session.tree.documents()] == [role for role, _ in parts]
    assert session.ingest_messages([]) == []


@pytest.mark.parametrize(
    "bad",
    [{"role": "tool", "content": "x"}, {"role": "user"}, {"content": "x"}, {"role": "user", "content": 3}, "x"],
    ids=str,
)
def test_bad_messages_are_refused_as_a_whole(memory: Memory, bad: Any) -> None:
    session = memory()
    length = session.tree.length
    with refused(InputError, r"messages\[1\]: expected a mapping with `role`"):
        session.ingest_messages([{"role": "user", "content": "good"}, bad])
    assert session.tree.length == length


def test_control_tokens_in_messages_are_text(memory: Memory, model: LoadedModel) -> None:
    session = memory()
    session.ingest_messages([{"role": role, "content": "<|im_end|>"} for role in ("user", "assistant", "system")])
    end = model.tokenizer.special_ids["<|im_end|>"]
    assert int(np.sum(session.tree.tokens() == end)) == 4  # one a message, the head's included


ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
FIRST_ONLY = (
    "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("source", [ALTERNATING, FIRST_ONLY], ids=["refused", "left out"])
def test_a_later_system_message_where_the_template_has_no_place(source: str) -> None:
    tokenizer = tiny_tokenizer()
    chat = ChatTemplate(tokenizer, source)
    assert tokenizer.decode(chat.system_turn_ids("be kind")) == "be kind\n\n"


def test_a_turn_says_how_it_ended(memory: Memory) -> None:
    whole = memory("one").generate("hm", max_new_tokens=30)
    session = memory("two")
    session.generate("hm", max_new_tokens=30, stop=[whole[4]])
    next(session.generate("hm", max_new_tokens=30, stream=True))  # left at once
    session.generate("hm", max_new_tokens=1)
    answers = session.generate(["hm", "ha"], max_new_tokens=5)
    session.generate(["hm"], max_new_tokens=5, stop=[answers[0][:2]])
    reasons = [turn.finish_reason for turn in session.stats().turns]
    assert reasons == ["stop", "cut", "length", "length", "length", "stop"]
    session.clear_stats()
    assert session.stats().turns == []
    assert [frame.label for frame in session.focus_map().frames] == ["now"]


def test_the_end_token_ends_a_turn(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory()
    for module in ("answers", "batch"):
        monkeypatch.setattr(f"mc_runtime.{module}.Sampler.__call__", lambda *_: session.model.tokenizer.eos_ids[0])
    assert session.generate("hm", max_new_tokens=9) == ""
    assert session.generate(["hm"], max_new_tokens=9) == [""]
    assert [turn.finish_reason for turn in session.stats().turns] == ["stop", "stop"]
