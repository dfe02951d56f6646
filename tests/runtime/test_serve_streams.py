"""Streams that are left, that fail, and that meet a server that ends."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from checks import SMALL
from live_server import MODEL, Live, live

from mc_runtime import Session
from mc_runtime.answers import Answer
from mc_runtime.errors import StorageFullError
from mc_runtime.model import LoadedModel
from mc_runtime.serve.names import folder_of
from mc_runtime.turns import Turn

Messages = Any


class Gate(threading.Event):
    """Decoding waits before its fourth token until this is set; `reached` is set when it does."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    event, plain = Gate(), Turn.step

    def step(self: Turn, token: int) -> Any:
        if self.stats.new_tokens == 3:
            event.reached.set()
            assert event.wait(60)
        return plain(self, token)

    monkeypatch.setattr(Turn, "step", step)
    yield event
    event.set()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def stream(server: Live, client: openai.OpenAI, text: str = "hello", **options: Any) -> Any:
    messages: Messages = [{"role": "user", "content": text}]
    given = {"user": "ann", "max_tokens": 500} | options
    return client.chat.completions.create(model=MODEL, messages=messages, stream=True, **given)


def held(root: Path, model: LoadedModel, user: str = "ann") -> tuple[list[str], str]:
    """Kinds of documents and the last answer, of a memory that no server has open."""
    with Session.open(root / folder_of(user), model, **SMALL) as session:
        session.tree.verify()
        last, end = session.tree.documents()[-1], model.chat.assistant_end_ids()
        ids = session.tree.tokens(last.start, last.stop).tolist()
        assert ids[-len(end) :] == end
        return [d.kind for d in session.tree.documents()], model.tokenizer.decode(ids[: -len(end)])


def test_a_stream_that_the_client_leaves_ends_and_is_kept(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "root", model) as server, server.client() as client:
        with stream(server, client, max_tokens=100_000) as chunks:
            first = [chunk.choices[0].delta.content or "" for _, chunk in zip(range(5), chunks, strict=False)]
        until(lambda: not server.server.app.service._tasks)
        answer = server.ask("and now?")
        assert answer.usage.completion_tokens == 8
    kinds, _ = held(tmp_path / "root", model)
    assert kinds == ["system", *["user", "assistant"] * 2]
    with Session.open(tmp_path / "root" / folder_of("ann"), model, **SMALL) as session:
        document = session.tree.documents()[2]
        text = model.tokenizer.decode(session.tree.tokens(document.start, document.stop).tolist())
    assert text.startswith("".join(first))
    assert len(text) < 50_000


def test_a_client_that_leaves_before_its_answer(tmp_path: Path, model: LoadedModel, gate: Gate) -> None:
    """One whose turn is running is cut short, one that waits for the memory is never asked."""
    with live(tmp_path / "root", model) as server:
        tasks, connections = server.server.app.service._tasks, []
        for number, text in enumerate(("the first", "the second"), 1):
            message = {"role": "user", "content": text}
            body = json.dumps({"model": MODEL, "messages": [message], "user": "ann", "max_tokens": 500})
            connections.append(HTTPConnection("127.0.0.1", server.port))
            connections[-1].request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            until(lambda n=number: len(tasks) == n)  # type: ignore[misc]
        assert gate.reached.wait(60)
        for connection in connections:
            connection.close()
        until(lambda: not server.server.server_state.connections)
        gate.set()
        until(lambda: not tasks)
    kinds, answer = held(tmp_path / "root", model)
    assert kinds == ["system", "user", "assistant"]
    assert len(answer) < 100


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "plain"])
def test_shutdown_ends_answers_under_way_and_keeps_them(
    tmp_path: Path, model: LoadedModel, gate: Gate, streamed: bool
) -> None:
    got: dict[str, Any] = {}

    def ask(server: Live) -> None:
        try:
            with server.client() as client:
                if streamed:
                    chunks = list(stream(server, client))
                    got["text"] = "".join(c.choices[0].delta.content or "" for c in chunks)
                    got["reason"] = chunks[-1].choices[0].finish_reason
                else:
                    answer = server.ask("hello", max_tokens=500).choices[0]
                    got["text"], got["reason"] = answer.message.content, answer.finish_reason
        except openai.APIError as error:
            got["error"] = error

    def wait_in_vain(server: Live) -> None:
        with pytest.raises(openai.InternalServerError) as error:
            server.ask("waits in vain")
        got["refused"] = error.value.code

    with live(tmp_path / "root", model) as server:
        threads = [threading.Thread(target=target, args=(server,)) for target in (ask, wait_in_vain)]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda n=number: len(server.server.app.service._tasks) == n)  # type: ignore[misc]
        assert gate.reached.wait(60)
        server.server.handle_exit(signal.SIGTERM, None)
        gate.set()
        for thread in threads:
            thread.join(60)
    assert "error" not in got
    assert (got["reason"], got["refused"]) == ("length", "shutting_down")
    kinds, answer = held(tmp_path / "root", model)
    assert kinds == ["system", "user", "assistant"]
    assert 0 < len(answer) < 100
    assert answer == got["text"]


def test_a_failure_in_mid_stream_is_an_event(
    tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Answer.pieces

    def pieces(self: Answer) -> Any:
        for number, piece in enumerate(plain(self)):
            if number == 3 and self.prompt == "fail":
                raise StorageFullError("no space")
            yield piece

    monkeypatch.setattr(Answer, "pieces", pieces)
    with live(tmp_path / "root", model) as server, server.client() as client:
        got: list[str | None] = []
        with pytest.raises(openai.APIError, match="the server's disk is full"):
            got.extend(chunk.choices[0].delta.content for chunk in stream(server, client, "fail"))
        assert len(got) == 4
        assert server.ask("hello").choices  # the memory goes on
    assert held(tmp_path / "root", model)[0] == ["system", *["user", "assistant"] * 2]
