"""What the server refuses, and in which words."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
from checks import SMALL, refused
from live_server import MODEL, Live, live

from mc_runtime import Session, cli
from mc_runtime.errors import InputError, MegaContextError
from mc_runtime.model import LoadedModel
from mc_runtime.serve.errors import ApiError
from mc_runtime.serve.names import folder_of
from mc_runtime.serve.server import Server
from mc_runtime.serve.settings import ServeSettings

HELLO: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: LoadedModel) -> Iterator[Live]:
    """One for all tests of requests that are refused: they must leave nothing behind."""
    with live(tmp_path_factory.mktemp("serve") / "root", model, max_request_bytes=20_000) as running:
        yield running
        assert set(os.listdir(running.server.app.settings.root)) <= {folder_of("default")}


def post(
    server: Live, body: bytes | dict[str, Any], path: str = "/v1/chat/completions", **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and body of a raw request."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", path, content, sent)
    response = connection.getresponse()
    result = json.loads(response.read())
    connection.close()
    return response.status, result


def check_error(answer: tuple[int, dict[str, Any]], status: int, message: str) -> None:
    got, body = answer
    assert got == status, body
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert message in body["error"]["message"]


def change(**fields: Any) -> dict[str, Any]:
    return HELLO | fields


def say(*messages: tuple[str, Any]) -> dict[str, Any]:
    return change(messages=[{"role": role, "content": content} for role, content in messages])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "Field required"),
        (b"{", "JSON"),
        (b"[" * 15_000, ""),
        (b"\xff\xfe", ""),
        (b"[]", ""),
        ({"model": MODEL}, "messages: Field required"),
        (change(messages=[]), "messages"),
        (change(messages="hello"), "messages"),
        (say(("tool", "x")), "role"),
        (say(("user", 3)), "messages.0.content: Input should be a valid string"),
        (say(("user", [{"type": "image_url"}])), "messages.0.content.0.type: Input should be 'text'"),
        (change(stop=["a", 1]), "stop.1: Input should be a valid string"),
        (say(("user", "  ")), "messages: expected the last one to be the user's, with text"),
        (say(("user", "hello"), ("assistant", "hi")), "messages: expected the last one to be the user's"),
        (say(("user", "\ud800")), ""),
        (change(temperature=-1), "temperature: expected"),
        (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature"),
        (change(temperature="hot"), "temperature"),
        (change(top_p=0), "top_p: expected"),
        (change(max_tokens=0), "max_tokens"),
        (change(max_completion_tokens=True), "max_completion_tokens"),
        (change(seed=-1), "seed: expected"),
        (change(stop=[""]), "stop: expected"),
        (change(n=2), "n: this server cannot do that"),
        (change(tools=[{"type": "function"}]), "tools: this server cannot do that"),
        (change(response_format={"type": "json_object"}), "response_format: this server cannot do that"),
        (change(logprobs=True), "logprobs: this server cannot do that"),
        (change(frequency_penalty=0.5), "frequency_penalty: this server cannot do that"),
        (change(user="x" * 300), "user: expected 1 to 256 characters"),
        (change(user="  "), "user: expected 1 to 256 characters that are not all blank, got '  '"),
        (say(("system", "be brief " * 9), ("user", "hello")), "the system message has"),
    ],
    ids=str,
)  # fmt: skip
def test_requests_that_cannot_be_used(server: Live, body: Any, message: str) -> None:
    check_error(post(server, body), 400, message)


def test_what_changes_nothing_is_ignored(server: Live) -> None:
    neutral = {"n": 1, "tools": [], "response_format": {"type": "text"}, "logprobs": False, "presence_penalty": 0}
    ignored = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "unheard_of": 1, "stop": None}
    assert post(server, HELLO | neutral | ignored)[0] == 200


def test_other_errors_have_the_same_shape(server: Live) -> None:
    check_error(post(server, change(model="gpt-5")), 404, "there is no model 'gpt-5' here; there is 'tiny'")
    check_error(post(server, HELLO, path="/v1/embeddings"), 404, "Not Found")
    check_error(post(server, HELLO, path="/health"), 405, "Method Not Allowed")
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a foreign web page could send
        check_error(post(server, HELLO, content_type=kind), 400, "the header `Content-Type: application/json`, got")
    check_error(post(server, HELLO, host="memory.example:80"), 403, "127.0.0.1 and localhost")


@contextmanager
def logged(name: str) -> Iterator[list[str]]:
    """What a logger is told inside the block."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


def test_what_is_refused_is_no_error_of_the_servers(server: Live) -> None:
    """No traceback in its log, whichever way a request is refused: a client could fill a disk with them."""
    with logged("uvicorn.error") as said, logged("mc_runtime.serve") as also_said:
        for body in (change(model="gpt-5"), change(seed=-1), change(user=" "), say(("user", "\ud800")), b"{"):
            assert 400 <= post(server, body)[0] < 500
        check_error(post(server, say(("system", "be brief " * 9), ("user", "hello"))), 400, "the system message has")
    assert said == also_said == []


def test_a_request_that_is_too_large(server: Live) -> None:
    big = say(("user", "x" * 30_000))
    check_error(post(server, big), 413, "larger than 20000 bytes")
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    parts = iter([json.dumps(big).encode()[i : i + 999] for i in range(0, 30_000, 999)])
    connection.request("POST", "/v1/chat/completions", parts, {"content-type": "application/json"})  # chunked
    response = connection.getresponse()
    check_error((response.status, json.loads(response.read())), 413, "larger than 20000 bytes")
    connection.close()


def test_a_bug_shows_nothing_of_itself(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    with monkeypatch.context() as patch:
        patch.setattr(Session, "generate", fail)
        for body in (HELLO, change(stream=True)):
            status, answer = post(server, body)
            assert status == 500
            assert "secret" not in str(answer)
            assert answer["error"]["code"] == "internal_error"
    assert post(server, HELLO)[0] == 200  # and the memory is free again


def test_a_token_is_asked_for(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "root", model, token="s3cret") as server:
        assert server.ask("hello").choices
        for key in ("S3cret", "s3cret2", "s3cre", "x", "s3cret\u00e9"):
            check_error(post(server, HELLO, authorization=f"Bearer {key}"), 401, "Authorization: Bearer")
        check_error(post(server, HELLO), 401, "Authorization: Bearer")
        check_error(post(server, HELLO, authorization="Basic s3cret"), 401, "Authorization: Bearer")
        with pytest.raises(openai.AuthenticationError), server.client(api_key="wrong") as client:
            client.models.list()
        connection = HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", "/health", headers={"host": "any.example"})
        assert connection.getresponse().read() == b'{"status":"ok"}'
        connection.close()


def test_without_a_token_only_loopback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "memory.example", ""):
        with refused(InputError, "no token is set"):
            ServeSettings(root=tmp_path, model_name="m", host=host)
        ServeSettings(root=tmp_path, model_name="m", host=host, token="t")
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        ServeSettings(root=tmp_path, model_name="m", host=host)
    monkeypatch.delenv("MC_SERVE_TOKEN", raising=False)
    monkeypatch.setattr(sys, "argv", ["mc", "serve", str(tmp_path / "root"), "--host", "0.0.0.0"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "no token is set" in capsys.readouterr().err
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("session", "message"),
    [
        ({"policy": "best"}, "policy: expected one of"),
        ({"budget": 10}, "budget: 10 slots cannot hold"),
        ({"budget": 100_000}, "give a smaller budget"),
        ({"gistnet": "nowhere.safetensors"}, "nowhere.safetensors: not a readable safetensors file"),
        ({"bugdet": 512}, "bugdet: expected fields of MemoryConfig"),
    ],
    ids=str,
)
def test_settings_that_no_memory_opens_with(
    tmp_path: Path, model: LoadedModel, session: dict[str, Any], message: str
) -> None:
    """The server does not start, instead of answering every request with an error."""
    with refused(MegaContextError, message):
        Server(ServeSettings(root=tmp_path / "root", model_name=MODEL, session=SMALL | session), model)
    assert not (tmp_path / "root").exists()


def test_a_root_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, before the model is looked for."""
    (tmp_path / "file").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mc", "serve", str(tmp_path / "file" / "memories"), "--model", "nowhere"])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "root: " in error
    assert "cannot be made (Not a directory); check the path" in error


def test_the_extra_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mc_runtime.serve.server")
    monkeypatch.setattr(sys, "argv", ["mc", "serve", str(tmp_path / "root")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "mc: uvicorn is not installed; pip install 'megacontext[serve]'\n"


@pytest.mark.parametrize(
    "wrong",
    [{"port": 70_000}, {"max_open": 0}, {"max_requests": True}, {"token": ""}, {"token": "a\nb"}, {"token": "é"}],
    ids=str,
)
def test_wrong_settings(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with refused(InputError, f"{next(iter(wrong))}: expected"):
        ServeSettings(root=tmp_path, model_name="m", **wrong)


HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "a\\b",
    "C:",
    "con",
    "a\0b",
    "\n",
    "ANN",
    "ann",
    "änn",
    "x" * 256,
)


@pytest.mark.parametrize("name", HOSTILE, ids=repr)
def test_a_name_is_one_plain_folder(name: str) -> None:
    if not name.strip():
        with pytest.raises(ApiError):
            folder_of(name)
        return
    folder = folder_of(name)
    assert set(folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert len(folder) <= 65
    assert not folder.startswith("-")
    assert [other for other in HOSTILE if other.strip() and folder_of(other).lower() == folder.lower()] == [name]


def test_hostile_names_are_memories_like_any_other(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "a" / "b" / "root", model) as server:
        for name in ("../../../outside", "..", "/" + str(tmp_path)):
            server.ask(f"my name is {name}", user=name, max_tokens=1)
            status, _ = post(server, HELLO, x_session_id=name)
            assert status == 200
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_dir()) == sorted(
        ["a", "b", "root", *(folder_of(name) for name in ("../../../outside", "..", "/" + str(tmp_path)))]
    )


def test_a_name_is_the_same_in_a_header(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "root", model) as server:
        server.ask("hello", user="änn")
        assert post(server, HELLO, x_session_id="änn".encode().decode("latin-1"))[0] == 200  # as UTF-8
        assert post(server, HELLO, x_session_id="änn")[0] == 200  # as latin-1
        check_error(post(server, HELLO, x_session_id=""), 400, "X-Session-ID: expected 1 to 256 characters")
    assert os.listdir(tmp_path / "root") == [folder_of("änn")]


def test_limits_of_memories(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "root", model, max_memories=2, max_memory_tokens=150) as server:
        server.ask("hello", user="a")
        server.ask("hello", user="b")
        with pytest.raises(openai.RateLimitError, match="at most 2 memories") as error:
            server.ask("hello", user="c")
        assert error.value.code == "memory_limit_reached"
        assert error.value.response.headers["x-should-retry"] == "false"
        server.ask("hello", user="a")
        # An answer ends where the memory is full; then nothing more goes in.
        answer = server.ask("hello", user="b", max_tokens=500)
        assert answer.choices[0].finish_reason == "length"
        memories = server.server.app.service.memories
        assert memories._open[folder_of("b")].session.tree.length == 150
        for options in ({}, {"stream": True}):
            with pytest.raises(openai.APIStatusError, match="it may hold 150") as full:
                server.ask("hello", user="b", **options)
            assert (full.value.status_code, full.value.code) == (413, "memory_full")
        assert memories._open[folder_of("b")].session.tree.length == 150


def test_too_many_requests(tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    go, plain = threading.Event(), Session.generate

    def slow(self: Session, *args: Any, **kw: Any) -> Any:
        assert go.wait(60)
        return plain(self, *args, **kw)

    monkeypatch.setattr(Session, "generate", slow)
    with live(tmp_path / "root", model, max_requests=3, max_open=1) as server, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.ask, "hello", user=f"user {n}") for n in range(3)]
        while len(server.server.app.service._tasks) < 3:
            threading.Event().wait(0.01)
        with pytest.raises(openai.RateLimitError, match="3 requests are under way") as error:
            server.ask("hello", user="one more")
        assert error.value.response.headers["retry-after"] == "1"
        with HTTPConnectionTo(server) as connection:  # the event loop is free while the model works
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
        go.set()
        assert all(request.result(60).choices for request in waiting)
        assert server.ask("hello", user="one more").choices


class HTTPConnectionTo(HTTPConnection):
    """Closed at the end of a `with` block."""

    def __init__(self, server: Live) -> None:
        super().__init__("127.0.0.1", server.port, timeout=60)

    def __enter__(self) -> HTTPConnectionTo:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_few_memories_are_open_and_none_is_lost(tmp_path: Path, model: LoadedModel) -> None:
    with live(tmp_path / "root", model, max_open=2) as server:
        for round_ in range(2):
            for name in "abc":
                server.ask(f"{name} {round_}", user=name)
                assert len(server.server.app.service.memories._open) <= 2
        with ThreadPoolExecutor(6) as pool:
            assert all(a.choices for a in pool.map(lambda name: server.ask("more", user=name), "abcabc"))
    for name in "abc":
        with Session.open(tmp_path / "root" / folder_of(name), model, **SMALL) as session:
            assert session.tree.count_documents("user") == 4


def test_a_memory_that_another_process_uses(tmp_path: Path, model: LoadedModel) -> None:
    with (
        Session.open(tmp_path / "root" / folder_of("ann"), model, **SMALL),
        live(tmp_path / "root", model) as server,
        pytest.raises(openai.ConflictError, match="another process is using this memory"),
    ):
        server.ask("hello", user="ann")
