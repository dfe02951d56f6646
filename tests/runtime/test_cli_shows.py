"""What the command line shows of texts that others wrote, and of memories with more in them than fits a screen."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from checks import Run, words

from mc_runtime import Session
from mc_runtime.model import LoadedModel
from mc_runtime.printable import printable

# Clears the screen, sets the window's title, reverses the line, ends it.
NASTY = "a\x1b[2J\x1b]0;owned\x07\x9b31m\u202eb\r\nc"
SHOWN = "a\\x1b[2J\\x1b]0;owned\\x07\\x9b31m\\u202eb\\r\\nc"


def harmless(text: str) -> bool:
    return all(character.isprintable() or character in "\n\t" for character in text)


def test_printable() -> None:
    assert printable(NASTY) == SHOWN
    assert printable("é 日本 \U0001f469\u200d\U0001f680 [b] \\n") == "é 日本 \U0001f469\u200d\U0001f680 [b] \\n"
    assert printable("\ud800\x00\x7f\u2028") == "\\ud800\\x00\\x7f\\u2028"
    assert printable("a\tb\nc\x1b", keep="\n\t") == "a\tb\nc\\x1b"


def test_titles_texts_and_questions_do_not_steer_the_terminal(run: Run, tmp_path: Path, model: LoadedModel) -> None:
    code, out, _ = run(
        "ingest", "m", "-", "--title", NASTY, "--fast", typed=f"{words(64)} zebra {NASTY} zebra {words(200)}"
    )
    assert code == 0
    assert out.startswith(f"{SHOWN}: tokens ")
    with Session.open(tmp_path / "m", model) as session:
        session.generate(f"hello {NASTY}", max_new_tokens=2)
    out = run("inspect", "m", "--columns", 9)[1]
    assert harmless(out)
    assert "\\x1b" in out
    code, out, err = run("chat", "m", "-n", 1, typed="/search zebra\n/focus sea \x1b[2J\n/map\n/\x1b[2J\n/quit\n")
    assert code == 0
    hits = [line for line in out.splitlines() if f"{SHOWN}: " in line]
    assert any("\\x1b" in hit.partition(f"{SHOWN}: ")[2] for hit in hits)
    assert "sea \\x1b[2J" in out
    assert harmless(out)
    assert "unknown command /\\x1b[2J" in err
    code, _, err = run("ingest", "m", "no\x1b[2Jfile.txt")
    assert code == 2
    assert "no\\x1b[2Jfile.txt" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_is_as_it_is_but_for_a_terminal(run: Run, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    class Out(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    def generate(*_: object, **__: object) -> object:
        return (piece for piece in ("one\n\ttwo", NASTY))

    monkeypatch.setattr(Session, "generate", generate)
    monkeypatch.setattr(sys, "stdout", Out())
    assert run("generate", "m", "hello")[0] == 0
    shown = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert shown == "one\n\ttwo" + (SHOWN.replace("\\n", "\n") if terminal else NASTY) + "\n"


def test_a_memory_of_many_documents_is_shown_by_its_newest(run: Run, tmp_path: Path, model: LoadedModel) -> None:
    with Session.open(tmp_path / "m", model) as session:
        for number in range(30):
            session.ingest(f"note {number}.", title=f"note-{number}-", mode="fast")
    code, out, _ = run("inspect", "m")
    assert code == 0
    listed = [number for number in range(30) if f" note-{number}- " in out]
    assert listed == list(range(10, 30))
    assert "the newest 20 of 31 documents; --all shows all" in out
    assert "31 documents" in out.splitlines()[0]
    out = run("inspect", "m", "--last", 3)[1]
    assert [number for number in range(30) if f" note-{number}- " in out] == [27, 28, 29]
    out = run("inspect", "m", "--all")[1]
    assert all(f" note-{number}- " in out for number in range(30))
    assert "newest" not in out
    assert run("inspect", "m", "--last", 0)[0] == 2


def test_a_map_of_many_turns_is_of_the_newest(run: Run) -> None:
    hints = "".join(f"/focus hint-{number}-\n" for number in range(23))
    out = run("chat", "m", typed=f"{hints}/map\n/quit\n")[1]
    assert [number for number in range(23) if f"hint-{number}-" in out] == list(range(3, 23))
    assert "the newest 20 of 23 turns; /map all shows all" in out
    out = run("chat", "m", typed=f"{hints}/map all\n/quit\n")[1]
    assert all(f"hint-{number}-" in out for number in range(23))
