"""A full disk, wherever it is met: what was acknowledged stays, the rest is undone, and the memory goes on."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import check_context, check_session, kv_by_rank, refused, words

import mc_runtime.snapshot
from mc_runtime import Session
from mc_runtime.errors import StorageFullError
from mc_runtime.tree import storage

Memory = Callable[..., Session]


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, name: str, after: int = 0) -> Iterator[list[int]]:
    """The disk is full from the call number `after` of a function of `storage` on."""
    plain, calls = getattr(storage, name), [0]

    def limited(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(storage, name, limited)
        yield calls


@pytest.mark.parametrize(
    ("name", "after"),
    [("pwrite", 0), ("pwrite", 9), ("truncate", 0), ("sync_file", 0), ("sync_file", 4), ("commit", 0)],
)
def test_a_full_disk_at_ingest(memory: Memory, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    session = memory()
    session.ingest(words(200))
    session.generate("hello", max_new_tokens=3)
    length, kv = session.tree.length, kv_by_rank(session.context)
    with full_disk(monkeypatch, name, after), refused(StorageFullError, "free space there and try again"):
        session.ingest(words(9000, seed=1), mode="fast")
    assert session.tree.length == length
    assert all(torch.equal(a, b) for a, b in zip(kv, kv_by_rank(session.context), strict=True))
    session.tree.verify()
    session.ingest(words(900, seed=1))
    session.generate("hello", max_new_tokens=3)
    check_session(session)


@pytest.mark.parametrize(("name", "after"), [("pwrite", 0), ("pwrite", 6), ("commit", 0), ("commit", 1), ("commit", 2)])
def test_a_full_disk_while_decoding(memory: Memory, monkeypatch: pytest.MonkeyPatch, name: str, after: int) -> None:
    """What was acknowledged stays, the rest of the answer is dropped, and the session goes on."""
    session = memory()
    session.ingest(words(300))
    session.generate("hello", max_new_tokens=3)
    pieces = []
    with full_disk(monkeypatch, name, after), refused(StorageFullError, "free space there and try again"):
        pieces += session.generate("go on", stream=True, max_new_tokens=40)
    assert not session.context.pending
    assert session.context.entries.stop == session.context.length == session.tree.length
    check_context(session.context)  # the newest tokens are others now: the next refocus brings back what they miss
    session.tree.verify()
    length = session.tree.length
    session.generate("again", max_new_tokens=10)
    assert session.tree.length > length
    check_session(session)
    session.close()
    again = memory()
    assert again.context.used > 0
    again.generate("again", max_new_tokens=3)
    check_session(again)


def test_a_disk_that_is_full_for_a_moment_loses_nothing(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit in the middle fails, the one at the end does not."""
    session = memory()
    plain, calls = storage.commit, []

    def once(connection: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        plain(connection)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "commit", once)
        with refused(StorageFullError, "free space"):
            session.generate("go on", max_new_tokens=40)
    kinds = [(d.kind, d.stop - d.start) for d in session.tree.documents()]
    end = len(session.model.chat.assistant_end_ids())
    assert [kind for kind, _ in kinds] == ["system", "user", "assistant"]
    assert kinds[-1][1] == 8 + end
    session.tree.verify()


@pytest.mark.parametrize("where", ["file", "catalogue"])
def test_a_full_disk_at_the_snapshot(
    memory: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    """The text is safe, half a file is not left behind, and saving again or opening anew works."""
    session = memory()
    session.ingest(words(300))
    session.generate("hello", max_new_tokens=10)
    tokens = session.tree.tokens().tolist()

    def save(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with full_disk(monkeypatch, "commit", after=99 if where == "file" else 0), monkeypatch.context() as patch:
        if where == "file":
            patch.setattr(mc_runtime.snapshot, "save_file", save)
        with refused(StorageFullError, "free s"):
            session.save()
        assert not list((tmp_path / "memory").glob("*.tmp"))
        with refused(StorageFullError, "free s"):
            session.close()
    session.close()
    again = memory()
    assert again.tree.tokens(0, len(tokens)).tolist() == tokens
    again.generate("hello", max_new_tokens=3)
    check_session(again)
