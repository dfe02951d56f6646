"""The server under OpenAI's own client: answers, streams, and what a conversation means to a memory."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from checks import SMALL, words
from live_server import MODEL, Live, live

from mc_runtime import Session
from mc_runtime.model import LoadedModel
from mc_runtime.serve.names import folder_of
from mc_runtime.tree import Document, Tree

Messages = list[dict[str, Any]]


@pytest.fixture
def server(tmp_path: Path, model: LoadedModel) -> Iterator[Live]:
    with live(tmp_path / "root", model) as running:
        yield running


def documents(server: Live, user: str = "ann") -> list[tuple[str, str]]:
    """Kind and text of what a memory holds."""
    settings, tokenizer = server.server.app.settings, server.server.app.model.tokenizer
    with Tree.open(settings.root / folder_of(user), mode="r") as tree:

        def text(d: Document) -> str:
            return tokenizer.decode(tree.tokens(d.start, d.stop).tolist(), special=True)

        return [(d.kind, text(d)) for d in tree.documents()]


def turn(question: str, answer: str) -> list[tuple[str, str]]:
    return [
        ("user", f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", f"{answer}<|im_end|>\n"),
    ]


def said(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_an_answer_is_the_sessions_answer(server: Live, model: LoadedModel, tmp_path: Path) -> None:
    answer = server.ask("what of the dog?", max_tokens=20)
    with Session.open(tmp_path / "alone", model, **SMALL) as session:
        expected = session.generate("what of the dog?", max_new_tokens=20)
        assert session.stats().turns[-1].new_tokens == answer.usage.completion_tokens
        prompt = session.tree.documents()[1].stop - session.tree.documents()[1].start
    assert said(answer) == expected
    assert answer.usage.prompt_tokens == prompt
    assert answer.usage.total_tokens == prompt + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model, answer.choices[0].message.role) == ("chat.completion", MODEL, "assistant")


def test_a_greedy_stream_equals_a_greedy_answer(server: Live) -> None:
    plain = server.ask("and the sea?", user="plain", max_tokens=40)
    with server.client() as client:
        chunks = list(
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": "and the sea?"}], user="streamed", max_tokens=40,
                stream=True, stream_options={"include_usage": True},
            )
        )  # fmt: skip
    pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
    assert len(pieces) > 10
    assert "".join(pieces) == said(plain)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == plain.usage
    assert len({c.id for c in chunks}) == 1
    assert documents(server, "plain") == documents(server, "streamed")


def test_a_conversation_that_is_sent_again_is_read_once(server: Live, model: LoadedModel, tmp_path: Path) -> None:
    messages: Messages = [{"role": "system", "content": "be kind"}]
    answers = []
    for question in ("one?", "two?", "three?"):
        messages.append({"role": "user", "content": question})
        answer = server.ask(messages)
        answers.append(said(answer))
        messages.append({"role": "assistant", "content": answers[-1]})
    turns = [document for q, a in zip(("one?", "two?", "three?"), answers, strict=True) for document in turn(q, a)]
    held = documents(server)
    assert held == [("system", "<|im_start|>system\nbe kind<|im_end|>\n"), *turns]
    # The last request's tokens: all that is held but the last answer; read was its last question alone.
    with Tree.open(server.server.app.settings.root / folder_of("ann"), mode="r") as tree:
        sizes = [d.stop - d.start for d in tree.documents()]
    assert answer.usage.prompt_tokens == sum(sizes[:-1])
    assert answer.usage.prompt_tokens_details.cached_tokens == sum(sizes[:-2])
    with Session.open(tmp_path / "alone", model, **SMALL | {"system_prompt": "be kind"}) as session:
        assert [session.generate(q, max_new_tokens=8) for q in ("one?", "two?", "three?")] == answers


def test_a_client_that_forgets_loses_nothing(server: Live) -> None:
    first = said(server.ask("one?"))
    second = said(server.ask("two?"))  # a new chat of the same user
    window: Messages = [  # a client that keeps the newest messages: the first one's question is gone
        {"role": "assistant", "content": first},
        {"role": "user", "content": "two?"},
        {"role": "assistant", "content": second[:3]},  # it left the stream early
        {"role": "user", "content": "three?"},
    ]
    third = said(server.ask(window))
    assert documents(server)[1:] == [*turn("one?", first), *turn("two?", second), *turn("three?", third)]


def test_what_the_memory_does_not_hold_is_read_in_order(server: Live) -> None:
    first = said(server.ask("one?"))
    messages: Messages = [
        {"role": "user", "content": "one?"},
        {"role": "assistant", "content": "something else"},  # edited
        {"role": "user", "content": [{"type": "text", "text": "from "}, {"type": "text", "text": "elsewhere"}]},
        {"role": "assistant", "content": "I see"},
        {"role": "user", "content": "unanswered"},
        {"role": "user", "content": "two?"},
    ]
    second = said(server.ask(messages))
    new = [*turn("one?", "something else"), *turn("from elsewhere", "I see"), *turn("unanswered", "")]
    assert documents(server)[1:] == [*turn("one?", first), *new, *turn("two?", second)]
    messages += [{"role": "assistant", "content": second}, {"role": "user", "content": "three?"}]
    third = said(server.ask(messages))
    assert documents(server)[-4:] == [*turn("two?", second), *turn("three?", third)]


def test_a_turn_that_was_said_twice_counts_twice(server: Live) -> None:
    answer = said(server.ask("yes", max_tokens=1))
    one: Messages = [{"role": "user", "content": "yes"}, {"role": "assistant", "content": answer}]
    again = said(server.ask([*one, *one, {"role": "user", "content": "no"}]))
    assert documents(server)[1:] == [*turn("yes", answer), *turn("yes", answer), *turn("no", again)]


def test_a_memory_of_the_command_line_is_one_of_the_servers(server: Live, model: LoadedModel) -> None:
    """What was said before there was a server counts as held, and texts that were ingested are no turns."""
    root = server.server.app.settings.root
    with Session.open(root / folder_of("ann"), model, **SMALL) as session:
        session.ingest("a text about the sea")
        first = session.generate("one?", max_new_tokens=4)
    messages: Messages = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": f" {first}\n"}]
    answer = server.ask([*messages, {"role": "user", "content": "two?"}])
    assert documents(server)[2:] == [*turn("one?", first), *turn("two?", said(answer))]
    assert answer.usage.prompt_tokens - answer.usage.prompt_tokens_details.cached_tokens == len(
        model.chat.user_turn_ids("two?")
    )


def test_an_answer_can_be_asked_for_again(server: Live) -> None:
    sampling = {"temperature": 1.5, "max_tokens": 12, "extra_body": {"top_k": 50}}
    first, second = (said(server.ask("tell me", seed=seed, **sampling)) for seed in (1, 3))
    assert documents(server)[1:] == [*turn("tell me", first), *turn("tell me", second)]
    other, same = (said(server.ask("tell me", user=user, seed=1, **sampling)) for user in ("bob", "cid"))
    assert other == same == first != second


def test_instructions_that_change_are_read_and_kept_in_detail(server: Live, model: LoadedModel, tmp_path: Path) -> None:
    def ask(instructions: str, question: str) -> None:
        server.ask([{"role": "developer", "content": instructions}, {"role": "user", "content": question}])

    ask("be kind", "one?")
    ask("be rude", "two?")
    ask("be rude", "three?")
    ask("be quiet", "four?")
    systems = [text for kind, text in documents(server) if kind == "system"]
    assert systems == [f"<|im_start|>system\n{text}<|im_end|>\n" for text in ("be kind", "be rude", "be quiet")]
    memory = server.server.app.service.memories._open[folder_of("ann")]
    memory.history.update()
    places = {text: memory.history.instructions(text) for text in ("be kind", "be rude", "be quiet")}
    quiet, rude = places["be quiet"], places["be rude"]
    assert memory.session.focus.pins == [(quiet.start, quiet.stop)]
    ask("be rude", "five?")  # held: nothing is read
    assert memory.session.focus.pins == [(rude.start, rude.stop)]
    ask("be kind", "six?")  # the head, which needs no pin
    assert memory.session.focus.pins == []
    assert [text for kind, text in documents(server) if kind == "system"] == systems


def test_instructions_of_a_new_memory_count_as_read(server: Live, model: LoadedModel) -> None:
    """Once: the memory holds them from then on."""
    system = {"role": "system", "content": "be kind"}
    first, second = (server.ask([system, {"role": "user", "content": text}]).usage for text in ("one?", "two?"))
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens == len(model.chat.system_ids("be kind"))
    assert first.prompt_tokens == second.prompt_tokens


def test_stop_strings_and_the_end_token(server: Live, model: LoadedModel) -> None:
    whole = said(server.ask("hm", max_tokens=30))
    stop = next(c for c in whole[5:] if whole.index(c) >= 5 and c.isascii())
    answer = server.ask("hm", user="bob", max_tokens=30, stop=[stop, "@@@"])
    assert said(answer) == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    # What was cut is held: the turn is not read again.
    messages: Messages = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": said(answer)}]
    server.ask([*messages, {"role": "user", "content": "go on"}], user="bob")
    assert [kind for kind, _ in documents(server, "bob")] == ["system", *["user", "assistant"] * 2]


def test_eight_clients_at_once_do_not_meet(server: Live) -> None:
    """Each gets what it would get alone, though their tokens are decoded in turns."""

    def talk(user: str) -> list[str]:
        messages: Messages = []
        for number in range(2):
            messages.append({"role": "user", "content": f"{user} asks {number}: {words(40, seed=number)}"})
            messages.append({"role": "assistant", "content": said(server.ask(messages, user=user, max_tokens=12))})
        return [m["content"] for m in messages if m["role"] == "assistant"]

    names = [f"user {number}" for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(talk, names))
    with Session.open(server.server.app.settings.root / "alone", server.server.app.model, **SMALL) as session:
        alone = [session.generate(f"user 3 asks {n}: {words(40, seed=n)}", max_new_tokens=12) for n in range(2)]
    assert together[3] == alone
    assert len({tuple(answers) for answers in together}) > 4  # by a random model; two may agree
    for name in names:
        text = "".join(text for _, text in documents(server, name))
        assert [other for other in names if other in text] == [name]
        assert [kind for kind, _ in documents(server, name)] == ["system", *["user", "assistant"] * 2]


def test_requests_for_one_memory_are_answered_in_turn(server: Live) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: said(server.ask(f"number {n}")), range(6)))
    held = documents(server)[1:]
    pairs = [turn(f"number {n}", answer) for n, answer in enumerate(answers)]
    assert sorted(zip(held[::2], held[1::2], strict=True)) == sorted((q, a) for q, a in pairs)


def test_the_header_names_the_memory_before_the_user_does(server: Live) -> None:
    server.ask("one?", user="ann", extra_headers={"X-Session-ID": "bob"})
    with server.client() as client:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "two?"}], max_tokens=2)
    root = server.server.app.settings.root
    server.ask("three?", user="")
    assert {entry.name for entry in root.iterdir()} == {folder_of(name) for name in ("bob", "default")}


def test_models(server: Live) -> None:
    with server.client() as client:
        assert [m.id for m in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).owned_by == "megacontext"
