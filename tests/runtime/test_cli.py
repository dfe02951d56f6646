"""The command line, in this process with the tiny model, and once as a real process."""

from __future__ import annotations

import importlib.metadata
import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import Run, words

from mc_kernels import extension
from mc_runtime import Session
from mc_runtime.config import DEFAULT_SYSTEM_PROMPT
from mc_runtime.model import LoadedModel


def head(model: LoadedModel) -> int:
    return len(model.chat.system_ids(DEFAULT_SYSTEM_PROMPT))


def test_ingest_generate_inspect(run: Run, model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(words(900))
    code, out, err = run("ingest", "m", "book.txt", "--budget", 512)
    assert (code, out) == (0, f"book.txt: tokens {head(model)} to {head(model) + 901:,}\n"), err  # a newline at its end
    code, out, _ = run("ingest", "m", "-", "--title", "[/b] :smile: " + "x" * 120, "--fast", typed="some more text")
    assert code == 0
    assert out.startswith("[/b] :smile: xxx")  # neither markup nor emoji nor a broken line
    assert out.count("\n") == 1
    code, out, err = run("generate", "m", "who is there?", "-n", 20, "--stats", "--budget", 600)
    assert code == 0
    assert "ms per token" in err
    with Session.open(tmp_path / "m", model, budget=600) as session:
        answer = session.tree.documents()[-1]
        end = model.chat.assistant_end_ids()
        said = model.tokenizer.decode(session.tree.tokens(answer.start, answer.stop).tolist()[: -len(end)])
        assert out.removesuffix("\n") == said
    code, out, _ = run("inspect", "m", "--columns", 40)
    assert code == 0
    assert f"{answer.stop:,} tokens in blocks of 32" in out
    for text in ("book.txt", "[/b]", "assistant, turn 1", "contextual", "fast", "level 1"):
        assert text in out


def test_sampling_options_reach_the_session(run: Run) -> None:
    options = ["-n", 30, "--temperature", 1.5, "--top-p", 0.9, "--top-k", 50, "--budget", 512]
    first = run("generate", "a", "hello", *options, "--seed", 1)[1]
    assert run("generate", "b", "hello", *options, "--seed", 1)[1] == first
    assert run("generate", "c", "hello", *options, "--seed", 2)[1] != first
    stop = first[4]
    assert run("generate", "d", "hello", *options, "--seed", 1, "--stop", stop)[1] == first[: first.index(stop)] + "\n"
    for option in (["--policy", "recency"], ["--gist-kind", "embedding"], ["--refresh", "none"]):
        assert run("generate", "e", "hello", "-n", 2, *option)[0] == 0


def test_another_engine_gives_the_same_answer(run: Run, model: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "book.txt").write_text(words(300))
    answers = []
    for engine in ("native", "transformers"):
        assert run("ingest", engine, "book.txt", "--budget", 512)[0] == 0
        code, out, err = run("generate", engine, "who is there?", "-n", 12, "--budget", 512, "--engine", engine)
        assert code == 0, err
        answers.append(out)
    assert answers[0] == answers[1] != ""
    code, _, err = run("generate", "native", "who?", "--engine", "abacus")
    assert code == 2
    assert "engine: expected one of native, transformers" in err


def test_chat_goes_on_after_a_restart(run: Run, model: LoadedModel, tmp_path: Path) -> None:
    code, out, err = run(
        "chat",
        "m",
        "-n",
        5,
        "--stats",
        typed="/map\nhello\n\n/map\n/search hello\n/focus hello\n/focus\n/what\n/search\n",
    )
    assert code == 0
    assert f"{head(model)} tokens remembered" in out
    assert "level 0" in out
    assert "unknown command /what" in err
    assert "expected words to search for" in err
    code, out, _ = run("chat", "m", "-n", 5, typed="and you?\n/quit\nnot read\n")
    assert code == 0
    with Session.open(tmp_path / "m", model) as session:
        kinds = [d.kind for d in session.tree.documents()]
    assert kinds == ["system", "user", "assistant", "user", "assistant"]


def test_standard_input_is_text(run: Run, tmp_path: Path, model: LoadedModel) -> None:
    """Also where it looks like the name of a file."""
    (tmp_path / "secret.txt").write_text("a secret")
    for typed in ("secret.txt", "Hello.World", "\ufeffsea and wind"):
        code, out, err = run("ingest", "m", "-", typed=typed)
        assert (code, out.partition(":")[0]) == (0, typed.removeprefix("\ufeff")), err
    with Session.open(tmp_path / "m", model) as session:
        texts = [
            model.tokenizer.decode(session.tree.tokens(d.start, d.stop).tolist()) for d in session.tree.documents()
        ]
    assert texts[1:] == ["secret.txt\n", "Hello.World\n", "sea and wind\n"]


@pytest.mark.parametrize("command", [["ingest", "m", "-"], ["generate", "m", "-"]], ids=" ".join)
def test_standard_input_that_is_no_text(run: Run, command: list[str]) -> None:
    for typed, what in ((b"na\xefve", "not UTF-8 text (byte 2)"), (b"a\x00b", "a binary file")):
        code, out, err = run(*command, typed=typed)
        assert (code, out) == (2, "")
        assert f"mc: standard input: {what}" in err
    code, out, err = run("chat", "m", "-n", 2, typed=b"na\xefve\nhello\n")
    assert code == 0
    assert "valid Unicode" in err


def test_an_answer_that_a_terminal_cannot_show(
    run: Run, tmp_path: Path, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert run("generate", "m", "who is there?", "-n", 20)[0] == 0
    sys.stdout.flush()
    with Session.open(tmp_path / "m", model) as session:
        answer = session.tree.documents()[-1]
        said = model.tokenizer.decode(session.tree.tokens(answer.start, answer.stop).tolist()[:20])
    assert not said.isascii()  # or this test could not fail
    assert shown.getvalue().decode("ascii") == "".join(c if c.isascii() else "?" for c in said) + "\n"


def test_an_interrupted_answer_is_kept_and_said_to_be_one(run: Run, tmp_path: Path, model: LoadedModel) -> None:
    plain = Session.generate

    def generate(session: Session, *args: Any, **kw: Any) -> Iterator[str]:
        pieces = plain(session, *args, **kw)
        try:
            for _ in range(3):
                yield next(pieces)
            raise KeyboardInterrupt
        finally:
            pieces.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "generate", generate)
        code, out, err = run("generate", "m", "who is there?", "-n", 40)
        assert (code, "(interrupted)" in err) == (130, True)
        assert run("chat", "m", "-n", 40, typed="hello\n/quit\n")[0] == 0  # a conversation goes on
    with Session.open(tmp_path / "m", model) as session:
        assert [d.kind for d in session.tree.documents()] == ["system", *["user", "assistant"] * 2]
    assert out.strip()


def test_a_file_that_is_not_there_makes_no_memory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("hello")
    for bad in ("missing.txt", "."):
        assert run("ingest", "m", "there.txt", bad)[0] == 2
    assert not (tmp_path / "m").exists()
    assert run("inspect", "m", "--columns", 0)[0] == 2


def test_an_empty_memory_can_be_inspected(run: Run) -> None:
    (code, out, _) = (run("chat", "m", typed=""), run("inspect", "m"))[1]
    assert code == 0
    assert "nothing has been asked" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ingest", "m", "missing.txt"], "missing.txt: cannot be read (No such file or directory); check the path"),
        (["ingest", "m", "."], "cannot be read (Is a directory)"),
        (["ingest", "m", "empty.txt"], "is empty; there is nothing to remember"),
        (["ingest", "m", "binary.bin"], "convert it to UTF-8 text first"),
        (["ingest", "file", "text.txt"], "is a file, and a tree is a directory: choose another path"),
        (["ingest", "m", "text.txt", "--budget", "100"], "or fewer recent_tokens"),
        (["ingest", "m", "text.txt", "--budget", "9999"], "give a smaller budget"),
        (["ingest", "m", "text.txt", "--gistnet", "binary.bin"], "binary.bin: not a readable safetensors file"),
        (["generate", "m", ""], "prompt: expected text"),
        (["generate", "m", "hi", "--policy", "best"], "policy: expected one of"),
        (["generate", "m", "hi", "--temperature", "-1"], "temperature: expected"),
        (["generate", "m", "hi", "-n", "0"], "max_new_tokens: expected"),
        (["inspect", "nowhere"], "there is no tree at"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_exit_code_2(run: Run, tmp_path: Path, args: list[str], message: str) -> None:
    for name, content in (("empty.txt", b""), ("binary.bin", b"\xff\x00" * 9), ("file", b"x"), ("text.txt", b"text")):
        (tmp_path / name).write_bytes(content)
    code, out, err = run(*args)
    assert code == 2
    assert out == ""
    line = err.strip()
    assert line.startswith("mc: ")
    assert message in line
    assert "\n" not in line
    assert "Traceback" not in err


def test_usage_errors_and_help(run: Run) -> None:
    assert run("generate")[0] == 2
    assert run("sing")[0] == 2
    assert run("ingest", "m", "x", "--budget", "many")[0] == 2
    code, out, _ = run("--help")
    assert code == 0
    assert "inspect" in out
    assert "A memory that outgrows" in " ".join(out.split())


def test_version_says_what_serves(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    package, torch_line, kernels = out.splitlines()
    assert package == f"megacontext {importlib.metadata.version('megacontext')}"
    assert torch.__version__ in torch_line
    assert any(kernels == f"CPU kernels: C++ ({level})" for level in extension.isa_levels())
    monkeypatch.setattr(extension, "available", lambda: "native code was not built: no compiler")
    assert run("--version")[1].splitlines()[2] == "CPU kernels: PyTorch (native code was not built: no compiler)"


def test_a_memory_in_use_or_of_another_model(run: Run, memory: Callable[..., Session], tmp_path: Path) -> None:
    session = memory("m")
    code, _, err = run("generate", tmp_path / "m", "hello")
    assert code == 2
    assert "close that one first" in err or "block_size is 8 in the tree and 32 was given" in err
    assert run("inspect", tmp_path / "m")[0] == 0  # readers need no lock
    session.close()
    code, _, err = run("generate", tmp_path / "m", "hello")
    assert (code, err.strip().count("\n")) == (2, 0)
    assert "block_size is 8 in the tree and 32 was given" in err


def test_anything_else_is_a_bug_and_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Session, "generate", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("generate", "m", "hello")


def test_the_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mc_runtime.cli", "ingest", tmp_path / "m", "README.md"]
    done = subprocess.run(
        [*command, "--model", tmp_path / "none.gguf"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("mc: ")
    assert done.stderr.strip().count("\n") == 0
    assert "none.gguf" in done.stderr
