"""Everything that can be read into a memory, and what cannot."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.sources import read_source


def test_text_paths_ids_and_pieces_are_the_same(model: LoadedModel, tmp_path: Path) -> None:
    tokenizer = model.tokenizer
    text = "The lighthouse is kept by Agnes.\nÄöü — 日本.\n"
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    ids = tokenizer.encode(text)
    expected = {
        "text": (text, "The lighthouse is kept by Agnes. Äöü —", None),
        "path": (path, "book.txt", str(path)),
        "path as text": (str(path), "book.txt", str(path)),
        "pieces": (iter([text[:7], "", text[7:]]), "The lighthouse is kept by Agnes. Äöü —", None),
        "ids": (ids, "token ids", None),
        "tuple": (tuple(ids), "token ids", None),
        "generator": ((i for i in ids), "token ids", None),
        "array": (np.array(ids, np.uint16), "token ids", None),
        "tensor": (torch.tensor(ids, dtype=torch.int32), "token ids", None),
    }
    for name, (source, title, origin) in expected.items():
        read = read_source(source, tokenizer)
        assert read.ids.tolist() == ids, name
        assert read.ids.dtype == np.int64
        assert (read.title, read.origin) == (title, origin), name
    assert read_source(path, tokenizer, title="mine").title == "mine"
    assert read_source(ids, tokenizer, title="mine").title == "mine"


def test_a_byte_order_mark_is_not_text(model: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_source(tmp_path / "a.txt", model.tokenizer).ids.tolist() == model.tokenizer.encode("hello\n")


@pytest.mark.parametrize(
    "text",
    [
        "a sentence. Another.txt one",
        "no suffix",
        "ends with a dot.",
        "line\nbreak.txt",
        "x" * 600 + ".txt",
        "3.14",
        "a\0.txt",
    ],
)
def test_text_that_is_no_path(model: LoadedModel, text: str) -> None:
    assert read_source(text, model.tokenizer).ids.tolist() == model.tokenizer.encode(text + "\n")


@pytest.mark.parametrize("end", ["\n", " ", "\n\n\t"])
def test_a_text_ends_in_white_space(model: LoadedModel, end: str) -> None:
    """So that its last word and the first of the next text are two."""
    tokenizer = model.tokenizer
    assert tokenizer.decode(read_source("told by Tom", tokenizer).ids.tolist()) == "told by Tom\n"
    assert read_source("told by Tom" + end, tokenizer).ids.tolist() == tokenizer.encode("told by Tom" + end)
    assert read_source(["told", " by", " Tom"], tokenizer).ids.tolist() == tokenizer.encode("told by Tom\n")


def bad_sources(tmp_path: Path) -> dict[str, tuple[Any, str]]:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "zeros.txt").write_bytes(b"text\x00text")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    return {
        "empty text": ("", "is empty; there is nothing to remember"),
        "blank text": (" \n ", "is empty"),
        "no pieces": ([], "is empty"),
        "empty pieces": (["", ""], "is empty"),
        "empty file": (tmp_path / "empty.txt", r"empty\.txt is empty"),
        "blank file": (tmp_path / "blank.txt", r"blank\.txt is empty"),
        "binary file": (tmp_path / "binary.bin", "convert it to UTF-8"),
        "zero bytes": (tmp_path / "zeros.txt", "give a text file"),
        "another encoding": (tmp_path / "latin.txt", r"not UTF-8 text \(byte 2\)"),
        "directory": (tmp_path, "cannot be read .*check the path"),
        "missing file": (tmp_path / "missing.txt", "No such file.*check the path"),
        "missing file as text": ("missing/book.txt", "No such file.*check the path"),
        "number": (3, "expected a path, text, token ids or an iterable, got int"),
        "nothing": (None, "got NoneType"),
        "bytes": (b"text", "got bytes"),
        "floats": ([1.0, 2.0], "integer token ids, got float64"),
        "booleans": ([True, False], "integer token ids, got bool"),
        "matrix": (np.zeros((2, 2), np.int64), r"of shape \[2, 2\]"),
        "nested": ([[1], [2, 3]], "got a nested one"),
        "mixture": (["a", 3], "got a mixture"),
        "no ids": (np.zeros(0, np.int64), "no token ids"),
        "negative id": ([1, -1], "token id -1 at position 1 is out of range"),
        "id too large": ([0, 1, 2, 258], "token id 258 at position 3 is out of range, the vocabulary has 258"),
        "huge id": ([2**70], "integer token ids"),
        "broken Unicode": ("a\ud800b", "valid Unicode"),
    }


@pytest.mark.parametrize("name", [
    "empty text", "blank text", "no pieces", "empty pieces", "empty file", "blank file", "binary file", "zero bytes",
    "another encoding", "directory", "missing file", "missing file as text", "number", "nothing", "bytes", "floats",
    "booleans", "matrix", "nested", "mixture", "no ids", "negative id", "id too large", "huge id", "broken Unicode",
])  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(memory: Callable[..., Session], tmp_path: Path, name: str) -> None:
    source, message = bad_sources(tmp_path)[name]
    session = memory()
    length, documents = session.tree.length, len(session.tree.documents())
    with pytest.raises(InputError, match=message) as error:
        session.ingest(source)
    assert "\n" not in str(error.value)
    assert (session.tree.length, len(session.tree.documents())) == (length, documents)


def test_a_file_without_permission(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"Permission denied.*check the path and its permissions"):
        read_source(tmp_path / "secret.txt", model.tokenizer)


def test_text_that_no_token_spells(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "encode", lambda text: [])
    with pytest.raises(InputError, match="no character that the tokenizer knows"):
        read_source("\x16", model.tokenizer)
