"""Texts as token arrays."""

from __future__ import annotations

import lzma
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mc_runtime.errors import InputError
from mc_runtime.model import LoadedModel
from mc_runtime.train.command import parse_texts
from mc_runtime.train.corpus import PIECE, Corpus, sample_mixture


def test_tokens_are_those_of_the_text(tmp_path: Path, model: LoadedModel) -> None:
    text = "All happy families\nare alike; " * 7 + "\n"
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.xz"
    plain.write_text(text)
    packed.write_bytes(lzma.compress(text.encode()))
    for path in (plain, packed):
        corpus = Corpus.open(path, model.tokenizer, tmp_path / "cache")
        assert corpus.ids.dtype == np.uint16
        assert corpus.ids.tolist() == list(model.tokenizer.encode(text))
    assert corpus.name == "b"


def test_a_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path, model: LoadedModel) -> None:
    line = "x" * 1023 + "\n"
    path = tmp_path / "long.txt"
    path.write_text(line * (2 * PIECE // len(line) + 3))
    corpus = Corpus.open(path, model.tokenizer, tmp_path / "cache")
    assert len(corpus.ids) == path.stat().st_size


def test_the_cache_is_used_and_follows_the_file(tmp_path: Path, model: LoadedModel) -> None:
    path, cache = tmp_path / "a.txt", tmp_path / "cache"
    path.write_text("one two three")
    first = Corpus.open(path, model.tokenizer, cache)
    (kept,) = cache.iterdir()
    stamp = kept.stat().st_mtime_ns
    Corpus.open(path, model.tokenizer, cache)
    assert kept.stat().st_mtime_ns == stamp
    path.write_text("one two three four")
    assert len(Corpus.open(path, model.tokenizer, cache).ids) > len(first.ids)


def test_samples(corpus: Callable[[str], Corpus]) -> None:
    a, b = corpus("a"), corpus("b")
    rows = sample_mixture([a, b], random.Random(0), 6, 50)
    assert rows.shape == (6, 50)
    assert rows.dtype == np.int64
    assert np.array_equal(rows, sample_mixture([a, b], random.Random(0), 6, 50))
    text = a.ids.astype(np.int64)
    piece = a.sample(random.Random(3), 20)
    assert any(np.array_equal(text[i : i + 20], piece) for i in range(len(text) - 19))
    with pytest.raises(InputError, match="at least"):
        a.sample(random.Random(0), len(a.ids) + 1)


def test_bad_input(tmp_path: Path, model: LoadedModel) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Corpus.open(tmp_path / "none.txt", model.tokenizer, tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="UTF-8"):
        Corpus.open(tmp_path / "bytes.txt", model.tokenizer, tmp_path)


def test_texts_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt.xz").write_bytes(b"")
    (tmp_path / "c.md").write_text("c")
    assert parse_texts([f"{tmp_path}=2.5"]) == [(tmp_path / "a.txt", 2.5), (tmp_path / "b.txt.xz", 2.5)]
    assert parse_texts([f"{tmp_path}/c.md"]) == [(tmp_path / "c.md", 1.0)]
    for bad in (f"{tmp_path}=x", f"{tmp_path}=0", f"{tmp_path}=-1"):
        with pytest.raises(InputError):
            parse_texts([bad])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="holds no"):
        parse_texts([str(empty)])
