"""The tree on disk: what is written comes back, as views where it can, and what cannot be is refused."""

import dataclasses
import hashlib
import sqlite3
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import torch

from mc_runtime.errors import InputError, TreeError, TreeMismatchError
from mc_runtime.tree import Document, NodeFlag, Tree, TreeSpec

K, E, KV = 4, 6, (2, 3, 5)
ALL = NodeFlag.KV | NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN


def make_spec(**changes):
    fields = {
        "block_size": K,
        "embed_dim": E,
        "n_layers": KV[0],
        "n_kv_heads": KV[1],
        "head_dim": KV[2],
        "dtype": "float32",
        "vocab_size": 1000,
        "model": "m",
        "tokenizer": "t",
        "gistnet": "g",
    }
    return TreeSpec(**{**fields, **changes})


def rows(n, seed=0):
    """summary, hidden, k, v of n nodes, distinct values."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *shape, generator=g) for shape in ((E,), (E,), KV, KV)]


def add_nodes(transaction, level, n, seed=0, contextual=True):
    s, h, k, v = rows(n, seed)
    transaction.append_nodes(level, s, hidden=h, k=k, v=v, contextual=contextual)
    return s, h, k, v


@pytest.fixture
def tree(tmp_path):
    with Tree.open(tmp_path / "tree", make_spec(), sync=False) as tree:
        yield tree


def before_and_after_reopening(tree):
    """The tree, then the same opened again."""
    yield tree
    tree.close()
    with Tree.open(tree.path, sync=False) as again:
        yield again


@contextmanager
def rolled_back(tree):
    """A transaction whose block ends with an exception."""
    with suppress(KeyError), tree.begin() as transaction:
        yield transaction
        raise KeyError


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip(tmp_path, dtype, given):
    spec = make_spec(dtype=dtype)
    stored = spec.torch_dtype
    s, h, k, v = (x.to(given) for x in rows(5))
    with Tree.open(tmp_path / "a", spec) as tree:
        with tree.begin() as t:
            assert t.append_tokens(range(20)) == (0, 20)
            assert t.append_tokens(np.arange(3, dtype=np.uint16)) == (20, 23)
            t.append_nodes(1, s, hidden=h, k=k, v=v, contextual=True)
            t.append_nodes(2, s[:1], contextual=False)
            assert (t.length, t.count(0), t.count(1), t.count(2), t.count(3)) == (23, 23, 5, 1, 0)
            assert (tree.length, tree.n_levels) == (0, 0)
        tree.verify()
    for mode in ("r", "w"):
        with Tree.open(tmp_path / "a", spec if mode == "r" else None, mode=mode) as tree:
            assert tree.spec == spec
            assert (tree.length, tree.n_levels) == (23, 2)
            assert [tree.count(level) for level in range(4)] == [23, 5, 1, 0]
            assert tree.tokens().dtype == np.uint32
            assert tree.tokens().tolist() == [*range(20), 0, 1, 2]
            assert tree.tokens(19, 21).tolist() == [19, 0]
            for got, want in [
                (tree.summaries(1), s),
                (tree.summaries(1, 2, 4), s[2:4]),
                (tree.summaries(2), s[:1]),
                (tree.hidden(1, 1, 5), h[1:]),
            ]:
                assert got.dtype == stored
                assert torch.equal(got, want.to(stored))
            gathered = tree.kv(1, [4, 0, 4])
            for got, want in zip(gathered, (k, v), strict=True):
                assert got.dtype == stored
                assert got.is_contiguous()
                assert torch.equal(got, want[[4, 0, 4]].to(stored))
            assert tree.flags(1).tolist() == [7] * 5
            assert tree.flags(2).tolist() == [0]
            assert tree.summaries(7).shape == (0, E)
            assert tree.flags(7).size == 0
            assert [x.shape for x in tree.kv(1, [])] == [(0, *KV)] * 2
            tree.verify()


def test_empty_tree_reads_empty(tree):
    assert (tree.length, tree.n_levels, tree.documents(), tree.state("x")) == (0, 0, [], None)
    assert tree.tokens().shape == (0,)
    assert tree.document_at(0) is None
    with tree.begin() as t:
        assert t.append_tokens([]) == (0, 0)
        t.append_nodes(1, torch.empty(0, E), contextual=True)
    tree.verify()
    assert tree.count(1) == 0


def test_reads_are_views_of_one_map_that_outlive_growth_and_close(tree):
    with tree.begin() as t:
        t.append_tokens(range(16))
        s, h, _, _ = add_nodes(t, 1, 4)
    tokens, summaries, hidden = tree.tokens(), tree.summaries(1), tree.hidden(1)
    assert np.shares_memory(tokens, tree.tokens(3, 9))
    assert not tokens.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
    assert tree.summaries(1, 2).data_ptr() == summaries.data_ptr() + 2 * E * 4
    assert tree.hidden(1, 1, 3).data_ptr() == hidden.data_ptr() + E * 4
    with tree.begin() as t:
        t.append_tokens(range(16, 32))
    # The next read within the mapped part makes no new map.
    assert np.shares_memory(tokens, tree.tokens(0, 32))
    with tree.begin() as t:
        t.append_tokens(np.arange(1_000_000) % 1000)
    assert tree.tokens(31, 33).tolist() == [31, 0]
    tree.close()
    assert tokens.tolist() == list(range(16))
    assert torch.equal(summaries, s)
    assert torch.equal(hidden, h)


def test_no_warning_from_reads(tree, recwarn):
    with tree.begin() as t:
        t.append_tokens(range(4))
        add_nodes(t, 1, 1)
    tree.summaries(1), tree.hidden(1), tree.kv(1, [0])
    assert not recwarn.list


def test_inputs_on_any_strides(tree):
    s, h, k, v = rows(3)
    with tree.begin() as t:
        t.append_tokens(torch.arange(24)[::2])
        t.append_nodes(
            1, s.T.contiguous().T, hidden=h, k=k.transpose(1, 3).contiguous().transpose(1, 3), v=v, contextual=True
        )
    assert tree.tokens().tolist() == list(range(0, 24, 2))
    assert torch.equal(tree.summaries(1), s)
    assert torch.equal(tree.kv(1, range(3))[0], k)
    assert torch.equal(tree.kv(1, np.array([2]))[1], v[2:])


@pytest.mark.parametrize(
    ("ids", "parts"),
    [
        ([1, 2, 1000, 1001], ("1000", "position 2")),
        ([1, -7], ("-7", "position 1")),
        ([0.0, 1.0], ("integer", "float64")),
        ([True], ("integer", "bool")),
        ([[1, 2]], ("one dimension", "(1, 2)")),
        ([2**70], ("integer",)),
        (np.array([2**63], np.uint64), (2**63,)),
        ("text", ("token ids",)),
        (torch.tensor([1.5]), ("float32",)),
    ],
)
def test_bad_token_ids(tree, ids, parts):
    with tree.begin() as t:
        with pytest.raises(InputError) as error:
            t.append_tokens(ids)
        one_line(error, *parts)
        # A refused input leaves the transaction usable.
        t.append_tokens([999])
    assert tree.tokens().tolist() == [999]


def test_bad_nodes(tree):
    s, h, k, v = rows(2)
    with tree.begin() as t:
        t.append_tokens(range(11))

        def refused(*parts, level=1, summary=s, contextual=True, **kw):
            with pytest.raises(InputError) as error:
                t.append_nodes(level, summary, contextual=contextual, **kw)
            one_line(error, *parts)

        nan = s.clone()
        nan[1, 3] = float("nan")
        infinite = v.clone()
        infinite[0, 1, 1, 1] = float("inf")
        refused("summary", "node 1", "finite", summary=nan)
        refused("hidden", "node 1", "finite", hidden=nan)
        refused("v of node 0", "finite", k=k, v=infinite)
        refused("[2, 6]", "[2, 5]", summary=s[:, :5])
        refused("hidden", "[2, 6]", "[1, 6]", hidden=h[:1])
        refused("k", "[2, 2, 3, 5]", k=k.flatten(2), v=v)
        refused("both", k=k)
        refused("both", v=v)
        refused("int64", summary=s.long())
        refused("list", summary=s.tolist())
        refused("level", level=0)
        refused("level", level=-1)
        refused("level 3", level=3)
        t.append_nodes(1, s, contextual=True)
        refused("3", "11 children", "fill only 2", summary=s[:1])
        refused("node 2 ", summary=nan[1:])
    assert tree.count(1) == 2
    tree.verify()


def test_value_too_large_for_the_stored_dtype(tmp_path):
    with Tree.open(tmp_path / "a", make_spec(dtype="float16"), sync=False) as tree, tree.begin() as t:
        t.append_tokens(range(4))
        with pytest.raises(InputError) as error:
            t.append_nodes(1, torch.full((1, E), 1e5), contextual=True)
        one_line(error, "float16", "node 0")


def test_rows_that_are_not_stored(tree):
    s, h, k, v = rows(4)
    with tree.begin() as t:
        t.append_tokens(range(16))
        t.append_nodes(1, s[:1], contextual=False)
        t.append_nodes(1, s[1:2], hidden=h[1:2], contextual=True)
        t.append_nodes(1, s[2:], k=k[2:], v=v[2:], contextual=False)
    for seen in before_and_after_reopening(tree):
        assert seen.flags(1).tolist() == [0, NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN, NodeFlag.KV, NodeFlag.KV]
        assert seen.flags(1, 1, 3).tolist() == [6, 1]
        assert seen.flags_at(1, [3, 0, 1, 1]).tolist() == [1, 0, 6, 6]
        assert seen.flags_at(1, []).tolist() == seen.flags_at(2, []).tolist() == []
        assert torch.equal(seen.hidden(1, 1, 2), h[1:2])
        assert torch.equal(seen.kv(1, [3, 2])[1], v[[3, 2]])
        for read, parts in [
            (lambda tree=seen: tree.kv(1, [2, 1]), ("node 1", "keys")),
            (lambda tree=seen: tree.hidden(1), ("node 0", "hidden")),
            (lambda tree=seen: tree.kv(1, [4]), ("node 4", "there are 4")),
            (lambda tree=seen: tree.kv(1, [-1]), ("node -1",)),
            (lambda tree=seen: tree.kv(2, [0]), ("node 0", "there are 0")),
            (lambda tree=seen: tree.kv(0, [0]), ("level",)),
            (lambda tree=seen: tree.kv(1, [0.5]), ("integers",)),
            (lambda tree=seen: tree.flags_at(1, [0, 4]), ("node 4", "there are 4")),
            (lambda tree=seen: tree.flags_at(0, [0]), ("level",)),
            (lambda tree=seen: tree.summaries(0), ("level",)),
            (lambda tree=seen: tree.summaries(1, 0, 5), ("there are 4",)),
            (lambda tree=seen: tree.tokens(5, 3), ("tokens 5 to 3",)),
            (lambda tree=seen: tree.tokens(-1), ("there are 16",)),
        ]:
            with pytest.raises(InputError) as error:
                read()
            one_line(error, *parts)
    tree.close()


def test_upgrade(tree):
    s, h, k, v = rows(6)
    old = rows(6, seed=1)
    with tree.begin() as t:
        t.append_tokens(range(24))
        t.append_nodes(1, s[:4], hidden=old[1][:4], k=old[2][:4], v=old[3][:4], contextual=False)
        t.append_nodes(1, s[4:5], contextual=False)
        t.append_nodes(1, s[5:], hidden=h[5:], k=k[5:], v=v[5:], contextual=True)
    reader = Tree.open(tree.path, mode="r")
    with tree.begin() as t:
        t.upgrade_nodes(1, 1, hidden=h[1:3], k=k[1:3], v=v[1:3])
        t.upgrade_nodes(1, 4, hidden=h[4:5], k=k[4:5], v=v[4:5])
        for start, n, parts in [(5, 1, ("node 5", "already")), (0, 2, ("node 1", "already")), (5, 2, ("there are 6",))]:
            with pytest.raises(InputError) as error:
                t.upgrade_nodes(1, start, hidden=h[:n], k=k[:n], v=v[:n])
            one_line(error, *parts)
        with pytest.raises(InputError, match="finite"):
            t.upgrade_nodes(1, 0, hidden=h[:1], k=k[:1] * float("nan"), v=v[:1])
    flags = [5, 7, 7, 5, 7, 7]
    hidden = torch.stack([old[1][0], h[1], h[2], old[1][3], h[4], h[5]])
    keys = torch.stack([old[2][0], k[1], k[2], old[2][3], k[4], k[5]])
    for seen in before_and_after_reopening(tree):
        seen.verify()
        assert seen.flags(1).tolist() == flags
        assert torch.equal(seen.hidden(1), hidden)
        assert torch.equal(seen.kv(1, [5, 3, 1, 0, 2, 4])[0], keys[[5, 3, 1, 0, 2, 4]])
        assert torch.equal(seen.summaries(1), s)
    # A snapshot keeps the rows that its flags speak of.
    assert reader.flags(1).tolist() == [5, 5, 5, 5, 0, 7]
    assert torch.equal(reader.hidden(1, 0, 4), old[1][:4])
    assert torch.equal(reader.kv(1, range(4))[1], old[3][:4])
    reader.refresh()
    assert reader.flags(1).tolist() == flags
    assert torch.equal(reader.hidden(1), hidden)
    tree.close()


def test_upgrade_that_is_rolled_back_leaves_the_old_rows(tree):
    s, h, k, v = rows(2)
    old = rows(2, seed=1)
    with tree.begin() as t:
        t.append_tokens(range(8))
        t.append_nodes(1, s, hidden=old[1], k=old[2], v=old[3], contextual=False)
    with rolled_back(tree) as t:
        t.upgrade_nodes(1, 0, hidden=h, k=k, v=v)
    for seen in before_and_after_reopening(tree):
        assert seen.flags(1).tolist() == [5, 5]
        assert torch.equal(seen.hidden(1), old[1])
        assert torch.equal(seen.kv(1, [0, 1])[0], old[2])
    tree.close()


def digest(ids):
    return hashlib.sha256(np.asarray(ids, "<u4").tobytes()).hexdigest()


def test_documents(tree):
    with tree.begin() as t:
        t.append_tokens(range(10))
        first = t.add_document(kind="system", title="Ä", source=None, start=0, stop=4, ingest="contextual")
        t.append_tokens(range(10, 20))
        second = t.add_document(
            kind="evidence", title="b", source="/x", start=6, stop=15, ingest="fast", score=0.5, metadata={"page": [1]}
        )
        third = t.add_document(kind="user", title="", source=None, start=15, stop=15, ingest="contextual")
        third = t.extend_document(third.id, 18)
    assert [first.id, second.id, third.id] == [1, 2, 3]
    assert abs(first.created - time.time()) < 60
    assert second == Document(
        2, "evidence", "b", "/x", 6, 15, "fast", 0.5, digest(range(6, 15)), second.created, {"page": [1]}
    )
    for seen in before_and_after_reopening(tree):
        assert seen.documents() == [first, second, third]
        assert [[d.id for d in seen.documents(start)] for start in (0, 1, 6, 7, 15, 16)] == [
            [1, 2, 3], [2, 3], [2, 3], [3], [3], [],
        ]  # fmt: skip
        assert [seen.count_documents(kind) for kind in (None, "system", "evidence", "tool")] == [3, 1, 1, 0]
        assert seen.document(2) == second
        found = [seen.document_at(i) for i in range(-1, 21)]
        assert [d and d.id for d in found] == [None, 1, 1, 1, 1, None, None, *[2] * 9, 3, 3, 3, None, None, None]
        spans = ((0, 4), (0, 6), (3, 7), (4, 6), (14, 16), (0, 20), (18, 20), (15, 15))
        found = [[d.id for d in seen.documents_over(*span)] for span in spans]
        assert found == [[1], [1], [1, 2], [], [2, 3], [1, 2, 3], [], []]
        with pytest.raises(InputError, match="no document with id 9"):
            seen.document(9)
    tree = Tree.open(tree.path)
    with tree.begin() as t:
        # Directly after opening: the hash is taken up from the file.
        third = t.extend_document(3, 19)
        t.append_tokens([7, 8])
        third = t.extend_document(3, 22)
        assert t.extend_document(3, 22) == third
    assert third.sha256 == digest([15, 16, 17, 18, 19, 7, 8])
    assert tree.document(3) == third == dataclasses.replace(tree.documents()[2])
    tree.verify()
    tree.close()


def test_extension_reads_only_new_tokens(tree, monkeypatch):
    with tree.begin() as t:
        t.append_tokens(range(100))
        t.add_document(kind="user", title="", source=None, start=0, stop=100, ingest="fast")
    read = []
    tokens = tree._layout.tokens
    original = tokens.read
    monkeypatch.setattr(tokens, "read", lambda start, stop: read.append((start, stop)) or original(start, stop))
    for stop in (103, 106):
        with tree.begin() as t:
            t.append_tokens([1, 2, 3])
            t.extend_document(1, stop)
    assert read == [(100, 103), (103, 106)]
    tree.verify()


def test_a_rolled_back_extension_does_not_spoil_the_hash(tree):
    with tree.begin() as t:
        t.append_tokens([1, 2])
        t.add_document(kind="user", title="", source=None, start=0, stop=2, ingest="fast")
    with rolled_back(tree) as t:
        t.append_tokens([3])
        t.extend_document(1, 3)
    with tree.begin() as t:
        t.append_tokens([4])
        t.extend_document(1, 3)
    assert tree.document(1).sha256 == digest([1, 2, 4])


def test_bad_documents(tree):
    with tree.begin() as t:
        t.append_tokens(range(20))

        def add(start, stop, **kw):
            fields = {"kind": "user", "title": "t", "source": None, "ingest": "fast", **kw}
            return t.add_document(start=start, stop=stop, **fields)

        add(5, 10)
        empty = add(10, 10)
        add(10, 12)
        for start, stop, kw, parts in [
            (15, 21, {}, ("holds 20",)),
            (-1, 2, {}, ("holds 20",)),
            (4, 3, {}, ("4 to 3",)),
            (9, 10, {}, ("document 1",)),
            (0, 6, {}, ("document 1",)),
            (0, 20, {}, ("overlap",)),
            (6, 7, {}, ("document 1", "5 to 10")),
            (11, 13, {}, ("document 3",)),
            (0, 1, {"metadata": {"x": {1}}}, ("JSON",)),
            (0, 1, {"score": float("nan")}, ("score",)),
            (0, 1, {"title": 3}, ("title", "int")),
            (0, 1, {"source": "\ud800"}, ("source",)),
        ]:
            with pytest.raises(InputError) as error:
                add(start, stop, **kw)
            one_line(error, *parts)
        for id, stop, parts in [(empty.id, 11, ("document 3",)), (1, 9, ("10",)), (1, 11, ("document 3",)), (8, 9, ())]:
            with pytest.raises(InputError) as error:
                t.extend_document(id, stop)
            one_line(error, *parts)
    # The same against committed documents.
    with tree.begin() as t:
        with pytest.raises(InputError, match="overlap document 3"):
            t.extend_document(1, 11)
        t.extend_document(3, 20)
        with pytest.raises(InputError, match="overlap document 3"):
            t.add_document(kind="user", title="t", source=None, start=13, stop=14, ingest="fast")
    tree.verify()
    assert [(d.start, d.stop) for d in tree.documents()] == [(5, 10), (10, 10), (10, 20)]
    assert tree.document_at(10).id == 3


def test_state(tree):
    with tree.begin() as t:
        t.set_state("a", b"\x00\xff")
        t.set_state("b", b"")
        assert tree.state("a") is None
    with tree.begin() as t:
        t.set_state("a", b"2")
        t.set_state("b", None)
        t.set_state("c", bytearray(b"3"))
        t.set_state("never", None)
    for seen in before_and_after_reopening(tree):
        assert [seen.state(key) for key in ("a", "b", "c", "never")] == [b"2", None, b"3", None]
    tree.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_size", 8), ("embed_dim", 7), ("dtype", "float16"), ("model", "other"), ("gistnet", "new")],
)
def test_mismatch(tree, field, value):
    stored = getattr(tree.spec, field)
    tree.close()
    for mode in ("r", "w"):
        with pytest.raises(TreeMismatchError) as error:
            Tree.open(tree.path, make_spec(**{field: value}), mode=mode)
        one_line(error, field, repr(stored), repr(value), "rebuild")
    # The refused open has let go of the lock.
    Tree.open(tree.path, make_spec()).close()


@pytest.mark.parametrize(
    "changes",
    [
        {"block_size": 1},
        {"embed_dim": 0},
        {"n_layers": 2.5},
        {"dtype": "int8"},
        {"vocab_size": 2**33},
        {"model": None},
        {"head_dim": True},
    ],
)
def test_bad_spec(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        make_spec(**changes)


def test_highest_token_id(tmp_path):
    with Tree.open(tmp_path / "a", make_spec(vocab_size=2**32), sync=False) as tree:
        with tree.begin() as t:
            t.append_tokens([2**32 - 1])
        assert tree.tokens()[0] == 2**32 - 1


def test_paths_that_are_no_tree(tmp_path):
    def refused(path, *parts, **kw):
        with pytest.raises(TreeError) as error:
            Tree.open(path, **kw)
        one_line(error, *parts)

    spec = make_spec()
    file = tmp_path / "file"
    file.write_text("x")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("x")
    missing = tmp_path / "missing"
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    (garbage / "catalogue.sqlite").write_bytes(b"not a database" * 500)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    db = sqlite3.connect(foreign / "catalogue.sqlite")
    db.execute("CREATE TABLE t (x)")
    db.close()
    for mode in ("r", "w"):
        refused(file, "is a file", spec=spec, mode=mode)
        refused(file / "below", spec=spec, mode=mode)
        refused(missing, "no tree", mode=mode)
        refused(missing, "no tree", mode=mode, spec=spec, create=False)
        refused(garbage, "damaged", mode=mode, spec=spec)
        refused(foreign, "another program", mode=mode, spec=spec)
    refused(full, "notes.txt", spec=spec)
    refused(full, "no tree", mode="r")
    refused(missing, "no tree", mode="r", spec=spec)
    assert not missing.exists()
    assert [p.name for p in full.iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="mode"):
        Tree.open(missing, spec, mode="a")


def test_newer_format_is_refused(tree):
    tree.close()
    db = sqlite3.connect(tree.path / "catalogue.sqlite")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(TreeError, match="format 99"):
        Tree.open(tree.path)


def test_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    with Tree.open("tree", make_spec(), sync=False) as tree:
        monkeypatch.chdir(tmp_path / "b")
        with tree.begin() as t:
            t.append_tokens([5])
        assert tree.tokens().tolist() == [5]


def test_a_tree_of_ten_million_tokens_opens_at_once_and_reads_lazily(tmp_path):
    spec = make_spec(block_size=32, n_layers=30, n_kv_heads=3, head_dim=64, dtype="bfloat16")
    nodes = 10_000_000 // 32
    k, v = torch.randn(2, 1, 30, 3, 64)
    with Tree.open(tmp_path / "big", spec, sync=False) as tree, tree.begin() as t:
        t.append_tokens(np.zeros(10_000_000, np.uint16))
        t.append_nodes(1, torch.zeros(nodes - 1, E), contextual=True)
        t.append_nodes(1, torch.zeros(1, E), k=k, v=v, contextual=True)
    assert (tmp_path / "big" / "level01.kv").stat().st_size == nodes * 2 * 30 * 3 * 64 * 2 > 7e9
    for mode in ("w", "r"):
        start = time.perf_counter()
        with Tree.open(tmp_path / "big", mode=mode) as tree:
            key, value = tree.kv(1, [nodes - 1])
            took = time.perf_counter() - start
        assert torch.equal(key, k.bfloat16())
        assert torch.equal(value, v.bfloat16())
        assert took < 0.5
