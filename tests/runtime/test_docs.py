"""What the pages in docs/ show is what the package does: their Python runs, their commands exist."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import words
from live_server import live
from typer.main import get_command

import mc_kernels
import mc_runtime.opening
from mc_runtime import cli
from mc_runtime.model import DEFAULT_MODEL, LoadedModel
from mc_runtime.serve.command import serve

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def commands() -> Iterator[list[str]]:
    """Every `mc ...` of a console block."""
    for page in sorted(DOCS.rglob("*.md")):
        for block in blocks(str(page.relative_to(DOCS)), "console"):
            yield from (shlex.split(line[2:], comments=True) for line in block.splitlines() if line.startswith("$ mc "))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: LoadedModel) -> Path:
    """A working directory with a book, where every model is the tiny one."""
    monkeypatch.setattr(mc_runtime.opening, "load_model", lambda name: model)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(words(700) + " Agnes keeps the lighthouse. " + words(200))
    return tmp_path


def run(source: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(source, "a block of the docs", "exec"), names)
    return names


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    *sorted(str(p.relative_to(DOCS.parent)) for p in DOCS.rglob("*.md")),
)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """In the repository: mkdocs checks the links of docs/ as a site, and knows no other files."""
    file = DOCS.parent / page
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", file.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        assert (file.parent / link.partition("#")[0]).exists(), f"{page}: {link}"


def test_the_quickstart_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    memory, kernels = blocks("index.md", "python")
    session = run(memory)["session"]
    assert [d.kind for d in session.tree.documents()] == ["system", "document", "user", "assistant"]
    shown = capsys.readouterr().out
    assert "Hit(start=" in shown  # the book's blocks that have the word
    assert "the storm of 1911" in shown  # a line of the focus map
    torch.manual_seed(0)
    names = run(kernels)
    slots = names["plan"].new_slots
    assert torch.equal(names["k"][:, :, slots[64:96]], names["k_new"][:, :, :32])
    assert torch.equal(names["v"][:, :, slots[1055]], names["v_new"][:, :, 32])


def test_the_kernels_page_runs_and_names_all_that_is_public(capsys: pytest.CaptureFixture[str]) -> None:
    available, packed = blocks("kernels.md", "python")
    run(available)
    assert "kv_splice_" in capsys.readouterr().out
    names = run(packed)
    exact = torch.ones(1, 128) @ (names["codes"] * 0.01 - 0.08).T
    assert torch.allclose(names["y"].float(), exact, atol=0.02)
    shown = re.findall(r"^::: mc_kernels\.(?:\w+\.op\.)?(\w+)$", (DOCS / "kernels.md").read_text(), re.M)
    assert sorted(shown) == sorted([*mc_kernels.__all__, "array"])  # a module of its own


def test_the_serving_page_runs(folder: Path, model: LoadedModel, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("serving.md", "python")
    assert "http://127.0.0.1:8000/v1" in block
    with live(folder / "memories", model, model_name=DEFAULT_MODEL) as server:
        names = run(block.replace("http://127.0.0.1:8000", server.url))
        names["client"].close()
        assert names["answer"].choices[0].message.content in capsys.readouterr().out


def test_commands_and_options_exist(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command: Any = get_command(cli.app)
    seen = set()
    for words_ in commands():
        sub = command.commands[words_[1]]
        sub.make_context(words_[1], words_[2:])  # parses and checks the options, runs nothing
        seen.add(words_[1])
    assert {"ingest", "generate", "chat", "inspect", "serve"} <= seen
    options = {o for p in command.commands["serve"].params for o in p.opts if o.startswith("--")} - {"--help"}
    named = set(re.findall(r"`(--[a-z-]+)`", (DOCS / "serving.md").read_text()))
    assert named == options


def test_the_quickstarts_commands_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [shlex.split(line[2:]) for line in blocks("index.md", "console")[1].splitlines()]
    assert len(lines) == 4
    for line in lines:
        monkeypatch.setattr(sys, "argv", line)
        monkeypatch.setattr(sys, "stdin", iter(["/quit\n"]))
        monkeypatch.setattr("builtins.input", lambda *_: "/quit")
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (0, None), capsys.readouterr().err


def test_defaults_on_the_serving_page_are_the_servers() -> None:
    table = dict(re.findall(r"^\| `(--max-[a-z-]+)` \| ([\d,]+)", (DOCS / "serving.md").read_text(), re.M))
    assert len(table) == 5
    for option, value in table.items():
        default = inspect.signature(serve).parameters[option[2:].replace("-", "_")].default
        assert int(value.replace(",", "")) == default
