"""A memory that is opened again: it goes on exactly, whatever happened to its saved context, or it is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import SMALL, check_session, kv_by_rank, relative_error, words
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.errors import TreeLockedError, TreeMismatchError
from mc_runtime.gistnet import GistNet
from mc_runtime.model import LoadedModel
from mc_runtime.snapshot import FILE, STATE

Memory = Callable[..., Session]
QUESTIONS = ("what of the dog?", "is there bread on the hill?", "and the lamp at night?")


def filled(memory: Memory, name: str = "memory", **settings: Any) -> Session:
    session = memory(name, **settings)
    session.ingest(words(700, seed=1))
    session.generate("who is there?", max_new_tokens=20)
    session.pin((60, 75))
    session.focus_on((120, 140))
    return session


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"archive_kv": 8},
        {"gist_kind": "projected", "ingest": "fast", "refresh": "none"},
        {"gist_kind": "embedding", "refresh": "top", "policy": "attention"},
        {"refresh": "full", "policy": "retrieval"},
    ],
    ids=["default", "archive", "projected", "embedding", "full"],
)
def test_reopening_goes_on_as_if_nothing_had_happened(memory: Memory, tmp_path: Path, config: dict[str, Any]) -> None:
    """Two copies of a memory, three turns: one session stays open, the other is closed after each turn."""
    session = filled(memory, "one", **config)
    session.save()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    answers = [session.generate(q, max_new_tokens=30) for q in QUESTIONS]
    edits = [turn.edits for turn in session.stats().turns[-3:]]
    again, edits_again = [], []
    for question in QUESTIONS:
        with memory("two", **config) as other:
            again.append(other.generate(question, max_new_tokens=30))
            edits_again.append(other.stats().turns[-1].edits)
    assert again == answers
    assert edits_again == edits
    assert sum(edits) > 0
    other = memory("two", **config)
    for one, two in zip(kv_by_rank(session.context), kv_by_rank(other.context), strict=True):
        assert torch.equal(one, two)
    assert session.focus.state() == other.focus.state()
    assert session.tree.tokens().tolist() == other.tree.tokens().tolist()


def test_a_memory_that_was_never_asked_opens_again(memory: Memory) -> None:
    memory().close()
    session = memory()
    session.ingest(words(300))
    session.close()
    session = memory()
    assert session.context.used == 0
    session.generate("who?", max_new_tokens=4)
    check_session(session)


def test_text_that_came_after_the_last_turn_is_brought_in(memory: Memory) -> None:
    session = filled(memory)
    session.ingest(words(100, seed=3))
    used = session.context.used
    session.close()
    session = memory()
    assert session.context.used == used
    session.generate("who?", max_new_tokens=4)
    assert session.context.entries.stop == session.tree.length
    check_session(session)


def spoil(path: Path, how: str) -> None:
    file = path / FILE
    if how == "missing":
        file.unlink()
    elif how == "cut":
        os.truncate(file, file.stat().st_size // 2)
    elif how == "garbage":
        file.write_bytes(b"\x00garbage" * 100)
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "of another state":
        save_file(load_file(file), str(file), {"name": "another"})


@pytest.mark.parametrize("how", ["missing", "cut", "garbage", "empty", "of another state"])
def test_a_context_that_cannot_be_read_is_rebuilt(
    memory: Memory, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    session = filled(memory)
    tokens, pins = session.tree.tokens().tolist(), list(session.focus.pins)
    session.close()
    spoil(tmp_path / "memory", how)
    with caplog.at_level(logging.INFO, "mc_runtime"):
        session = memory()
    assert "rebuilt" in caplog.text
    assert session.tree.tokens().tolist() == tokens
    assert session.focus.pins == pins
    assert session.context.used == 0
    session.generate("who is there?", max_new_tokens=12)
    check_session(session)
    session.tree.verify()
    session.close()
    assert memory().context.used > 0


def test_a_snapshot_of_a_shorter_history_is_not_used(memory: Memory, tmp_path: Path) -> None:
    """A process that died after a turn, before it saved: the old snapshot lacks tokens."""
    session = filled(memory)
    session.save()
    session.generate("one more", max_new_tokens=9)
    tokens = session.tree.tokens().tolist()
    session.tree.close()  # as a dying process would: no snapshot
    session._closed = True
    again = memory()
    assert again.context.used == 0
    assert again.tree.tokens().tolist() == tokens
    again.generate("who is there?", max_new_tokens=9)
    check_session(again)


@pytest.mark.parametrize("budget", [128, 400])
def test_another_budget(memory: Memory, budget: int) -> None:
    session = filled(memory)
    used = session.context.used
    session.close()
    session = memory(budget=budget)
    assert session.context.used == (used if used <= budget else 0)
    for question in QUESTIONS:
        session.generate(question, max_new_tokens=20)
        check_session(session)
    assert session.stats().budget == budget
    if budget == 400:
        assert session.context.used > used


def test_another_kind_of_gist_is_not_mixed_in(memory: Memory) -> None:
    filled(memory).close()
    session = memory(gist_kind="projected")
    assert session.context.used == 0
    session.generate("who?", max_new_tokens=4)
    context = session.context
    ranks = (context.entries.levels > 0).nonzero()[0]
    read = context.reader.read(session.tree, context.entries.levels[ranks], context.entries.index[ranks])
    assert relative_error(kv_by_rank(context)[0][:, :, ranks], read.k) < 1e-6


def test_the_archive_survives(memory: Memory) -> None:
    session = filled(memory, archive_kv=6)
    session.generate("go on", max_new_tokens=60)
    kept = session.context.archive.items()
    assert 0 < len(kept) <= 6
    session.close()
    again = memory(archive_kv=6).context.archive.items()
    assert [block for block, _ in again] == [block for block, _ in kept]
    for (_, (k, v)), (_, (k_again, v_again)) in zip(kept, again, strict=True):
        assert torch.equal(k, k_again)
        assert torch.equal(v, v_again)


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def contents(path: Path) -> dict[str, bytes]:
    """All files but the catalogue, in whose header SQLite counts even openings."""
    return {p.name: p.read_bytes() for p in path.iterdir() if not p.name.startswith("catalogue")}


@pytest.mark.parametrize("what", ["model", "tokenizer", "gistnet", "block_size", "dtype"])
def test_a_memory_of_something_else_is_refused(memory: Memory, model: LoadedModel, tmp_path: Path, what: str) -> None:
    filled(memory).close()
    before = contents(tmp_path / "memory")
    settings: dict[str, Any] = {}
    if what == "model":
        settings["model"] = tiny_model(seed=1)
    elif what == "dtype":
        settings["model"] = tiny_model(dtype=torch.bfloat16)
    elif what == "tokenizer":
        changed = tiny_model().tokenizer
        changed.fingerprint = "another"
        settings["model"] = replace(model, tokenizer=changed)
    elif what == "gistnet":
        GistNet.untrained(model.decoder, SMALL["block_size"]).save(tmp_path / "net.safetensors")
        settings["gistnet"] = tmp_path / "net.safetensors"
    else:
        settings |= {"block_size": 16}
    with pytest.raises(TreeMismatchError) as error:
        memory(**settings)
    assert what in one_line(error)
    assert "use another directory" in one_line(error)
    assert contents(tmp_path / "memory") == before
    memory().generate("who?", max_new_tokens=2)


def test_a_second_writer_is_refused(memory: Memory, tmp_path: Path) -> None:
    session = filled(memory)
    with pytest.raises(TreeLockedError, match="in this process") as error:
        memory()
    one_line(error)
    code = (
        "import sys\nfrom mc_runtime.errors import TreeLockedError\nfrom mc_runtime.tree import Tree\n"
        "try: Tree.open(sys.argv[1])\nexcept TreeLockedError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "memory"], capture_output=True, text=True, check=True)
    assert f"being written by process {os.getpid()}" in done.stdout
    session.generate("still mine", max_new_tokens=2)


def test_the_state_says_what_it_belongs_to(memory: Memory) -> None:
    session = filled(memory)
    session.save()
    state = json.loads(session.tree.state(STATE) or b"")
    assert state["length"] == session.tree.length
    assert state["focus"]["pins"] == [[60, 75]]
