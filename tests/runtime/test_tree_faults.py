"""The tree when things go wrong: full disks, exceptions, torn files, other writers, forks."""

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mc_runtime
from mc_runtime.errors import InputError, StorageFullError, TreeError, TreeLockedError
from mc_runtime.tree import Tree, TreeSpec, storage

SPEC = TreeSpec(4, 6, 2, 3, 5, "float32", 1000, "m", "t", "g")
KV = (2, 3, 5)
SITES = ("create", "pwrite", "truncate", "sync_file", "sync_directory", "commit")


def add_block(tree, value, contextual=True):
    """One committed block: 4 tokens, a node with all rows, a longer document, a state."""
    with tree.begin() as t:
        start, stop = t.append_tokens([value] * 4)
        x = float(value)
        t.append_nodes(
            1,
            torch.full((1, 6), x),
            hidden=torch.full((1, 6), x + 0.25),
            k=torch.full((1, *KV), x + 0.5),
            v=torch.full((1, *KV), x + 0.75),
            contextual=contextual,
        )
        if tree.documents():
            t.extend_document(1, stop)
        else:
            t.add_document(kind="user", title="t", source=None, start=start, stop=stop, ingest="contextual")
        t.set_state("last", str(value).encode())


def assert_blocks(tree, values):
    tree.verify()
    assert tree.tokens().tolist() == [value for value in values for _ in range(4)]
    assert tree.summaries(1)[:, 0].tolist() == values
    assert tree.hidden(1)[:, 5].tolist() == [value + 0.25 for value in values]
    k, v = tree.kv(1, range(len(values)))
    assert k[:, 1, 2, 4].tolist() == [value + 0.5 for value in values]
    assert v[:, 0, 0, 0].tolist() == [value + 0.75 for value in values]
    assert tree.state("last") == (str(values[-1]).encode() if values else None)
    assert [d.stop for d in tree.documents()] == ([4 * len(values)] if values else [])


def open_and_verify(path, mode):
    with Tree.open(path, mode=mode) as tree:
        tree.verify()


def message_of(kind, call, *args):
    """The message, checked to be one line, of the error of this kind that the call raises; None if it does not."""
    try:
        call(*args)
    except kind as error:
        message = str(error)
    else:
        return None
    assert message
    assert "\n" not in message
    return message


def sizes(path):
    return {p.name: p.stat().st_size for p in path.iterdir() if p.name == "tokens" or p.name.startswith("level")}


class Failing:
    """Lets each I/O function of the tree fail at its n-th call from `arm` on; a write that fails is half done."""

    def __init__(self, monkeypatch):
        self.left = {}
        self.error = None
        self.calls = []
        for site in SITES:
            monkeypatch.setattr(storage, site, self.wrap(site, getattr(storage, site)))

    def arm(self, site, n, error):
        self.left = {site: n}
        self.error = error

    def wrap(self, site, original):
        def call(*args):
            self.calls.append((site, args[0]))
            if site in self.left:
                self.left[site] -= 1
                if self.left[site] == 0:
                    del self.left[site]
                    if site == "pwrite":
                        original(args[0], args[1][: len(args[1]) // 2], args[2])
                    raise self.error
            return original(*args)

        return call


@pytest.fixture
def failing(monkeypatch):
    return Failing(monkeypatch)


def full_disk(site):
    if site != "commit":
        return OSError(errno.ENOSPC, "No space left on device")
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


@pytest.mark.parametrize("levels_exist", [False, True])
@pytest.mark.parametrize("site", SITES)
def test_full_disk_at_every_call(tmp_path, failing, site, levels_exist):
    """Whichever call runs out of space, the transaction leaves nothing and the next one works."""
    hit = 0
    for n in range(1, 20):
        path = tmp_path / str(n)
        with Tree.open(path, SPEC) as tree:
            values = [1, 2] if levels_exist else []
            for value in values:
                add_block(tree, int(value))
            failing.arm(site, n, full_disk(site))
            message = message_of(StorageFullError, add_block, tree, 3)
            if message:
                hit += 1
                assert "free space" in message
                assert str(path) in message
                assert_blocks(tree, values)
                need = 4 * len(tree.tokens())
                assert sizes(path).get("tokens", 0) == need
                assert all(size == 24 * len(values) for name, size in sizes(path).items() if "summary" in name)
                with Tree.open(path, mode="r") as reader:
                    assert_blocks(reader, values)
                add_block(tree, 4)
                assert_blocks(tree, [*values, 4])
            else:
                # The site is called fewer than n times.
                assert failing.left
                break
        with Tree.open(path) as tree:
            assert_blocks(tree, [*values, 4])
    # Nothing new to create, nor to grow, once the files exist.
    expected = {"create": 4, "truncate": 4, "sync_directory": 1} if not levels_exist else {}
    assert hit == {"pwrite": 4, "sync_file": 4, "commit": 1, **expected}.get(site, 0)


def test_disk_that_really_is_full(tmp_path, monkeypatch):
    """The error of the system itself, through a limit on the size of files."""
    import resource

    with Tree.open(tmp_path / "t", SPEC) as tree:
        add_block(tree, 1)
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, old[1]))
            with pytest.raises(TreeError, match="File too large"), tree.begin() as t:
                t.append_tokens(np.zeros(1 << 20, np.int64))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, handler)
        assert_blocks(tree, [1])
        add_block(tree, 2)
        assert_blocks(tree, [1, 2])


def test_full_disk_in_an_upgrade(tmp_path, failing):
    x = torch.full((1, 6), 9.0), torch.full((1, *KV), 9.0)
    with Tree.open(tmp_path / "t", SPEC) as tree:
        add_block(tree, 1, contextual=False)
        for site, n in [("pwrite", 1), ("pwrite", 2), ("sync_file", 1), ("sync_file", 2), ("commit", 1)]:
            failing.arm(site, n, full_disk(site))
            with pytest.raises(StorageFullError), tree.begin() as t:
                t.upgrade_nodes(1, 0, hidden=x[0], k=x[1], v=x[1])
            assert not failing.left
            assert_blocks(tree, [1])
            assert tree.flags(1).tolist() == [5]
        with tree.begin() as t:
            t.upgrade_nodes(1, 0, hidden=x[0], k=x[1], v=x[1])
        assert tree.flags(1).tolist() == [7]
        assert tree.kv(1, [0])[0].unique().tolist() == [9.0]


def test_every_file_is_synced_before_the_commit(tmp_path, failing):
    with Tree.open(tmp_path / "t", SPEC) as tree:
        for value in (1, 2):
            failing.calls.clear()
            add_block(tree, value)
            names = [site for site, _ in failing.calls]
            assert names[-1] == "commit"
            assert names.count("sync_directory") == (1 if value == 1 else 0)
            for fd in {fd for site, fd in failing.calls if site == "pwrite"}:
                written = max(i for i, call in enumerate(failing.calls) if call == ("pwrite", fd))
                assert ("sync_file", fd) in failing.calls[written:]
        with tree.begin() as t:
            t.set_state("x", b"y")
    with Tree.open(tmp_path / "t", SPEC, sync=False) as tree:
        failing.calls.clear()
        add_block(tree, 3)
        assert not [site for site, _ in failing.calls if site.startswith("sync")]


def test_a_commit_that_took_place_is_not_undone(tmp_path, monkeypatch):
    """An interrupt or error right after SQLite's commit: the blocks are in the database, so they stay."""
    commit = storage.commit
    for error in (KeyboardInterrupt(), sqlite3.OperationalError("late")):

        def late(connection, error=error):
            commit(connection)
            raise error

        path = tmp_path / type(error).__name__
        with Tree.open(path, SPEC) as tree:
            add_block(tree, 1)
            monkeypatch.setattr(storage, "commit", late)
            if isinstance(error, KeyboardInterrupt):
                with pytest.raises(KeyboardInterrupt):
                    add_block(tree, 2)
            else:
                add_block(tree, 2)
            monkeypatch.setattr(storage, "commit", commit)
            assert_blocks(tree, [1, 2])
            add_block(tree, 3)
        with Tree.open(path) as tree:
            assert_blocks(tree, [1, 2, 3])


def test_an_unknown_outcome_stops_the_writer_and_cuts_nothing(tmp_path, monkeypatch):
    tree = Tree.open(tmp_path / "t", SPEC)
    add_block(tree, 1)
    commit = storage.commit

    def lost(connection):
        commit(connection)
        connection.close()
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(storage, "commit", lost)
    with pytest.raises(TreeError, match="open it again"):
        add_block(tree, 2)
    with pytest.raises(TreeError, match="open it again"):
        tree.begin()
    tree.close()
    monkeypatch.setattr(storage, "commit", commit)
    with Tree.open(tmp_path / "t") as tree:
        assert_blocks(tree, [1, 2])


def test_roll_back_cuts_and_forgets(tmp_path):
    with Tree.open(tmp_path / "t", SPEC, sync=False) as tree:
        add_block(tree, 1)
        for error in (KeyError, KeyboardInterrupt):

            def attempt(error=error):
                with tree.begin() as t:
                    t.append_tokens(range(100))
                    t.append_nodes(1, torch.ones(3, 6), contextual=False)
                    t.append_nodes(2, torch.ones(1, 6), contextual=False)
                    t.add_document(kind="user", title="t", source=None, start=50, stop=60, ingest="fast")
                    t.set_state("last", b"no")
                    raise error

            with pytest.raises(error):
                attempt()
            assert_blocks(tree, [1])
            assert sizes(tree.path)["tokens"] == 16
            assert sizes(tree.path)["level02.summary"] == 0
            assert tree.n_levels == 1
        add_block(tree, 2)
        assert_blocks(tree, [1, 2])


def test_transactions_one_at_a_time_and_only_inside_their_block(tmp_path):
    with Tree.open(tmp_path / "t", SPEC, sync=False) as tree:
        unopened = tree.begin()
        with pytest.raises(TreeError, match="not open"):
            unopened.append_tokens([1])
        with tree.begin() as first:
            with pytest.raises(TreeError, match="another transaction"):
                tree.begin()
            with pytest.raises(TreeError, match="another transaction"):
                unopened.__enter__()
            first.append_tokens([1])
        with pytest.raises(TreeError, match="not open"):
            first.append_tokens([1])
        # Begun before the commit above: it must not write over it.
        with unopened as t:
            assert t.append_tokens([2]) == (1, 2)
        assert tree.tokens().tolist() == [1, 2]


def test_an_error_that_the_block_swallows_still_rolls_back(tmp_path, failing):
    def swallow(tree):
        with tree.begin() as t:
            t.append_tokens([7])
            failing.arm("pwrite", 1, full_disk("pwrite"))
            with pytest.raises(StorageFullError):
                t.append_tokens([8])
            with pytest.raises(TreeError, match="cannot go on"):
                t.append_tokens([9])

    with Tree.open(tmp_path / "t", SPEC) as tree:
        add_block(tree, 1)
        with pytest.raises(TreeError, match="rolled back"):
            swallow(tree)
        assert_blocks(tree, [1])
        assert sizes(tree.path)["tokens"] == 16


def test_closing_inside_a_transaction_rolls_back(tmp_path):
    def attempt(tree):
        with tree.begin() as t:
            t.append_tokens([1, 2])
            tree.close()
            with pytest.raises(TreeError, match="closed"):
                t.append_tokens([3])

    tree = Tree.open(tmp_path / "t", SPEC)
    add_block(tree, 1)
    with pytest.raises(TreeError, match="closed"):
        attempt(tree)
    assert sizes(tree.path)["tokens"] == 16
    for read in (tree.tokens, lambda: tree.summaries(1), tree.begin, tree.verify, tree.refresh):
        with pytest.raises(TreeError, match="closed"):
            read()
    tree.close()
    with Tree.open(tree.path) as tree:
        assert_blocks(tree, [1])


def test_torn_tail_is_cut_by_the_next_writer_only(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        add_block(tree, 1)
    whole = sizes(path)
    assert whole == {"tokens": 16, "level01.summary": 24, "level01.hidden": 24, "level01.kv": 240}
    for name in whole:
        with (path / name).open("ab") as file:
            file.write(b"\xff" * 77)
    (path / "level02.summary").write_bytes(b"x" * 10)
    (path / "level01.kv.fast").write_bytes(b"x" * 10)
    torn = sizes(path)
    with Tree.open(path, mode="r") as reader:
        assert_blocks(reader, [1])
    assert sizes(path) == torn
    with Tree.open(path) as tree:
        assert sizes(path) == {**whole, "level02.summary": 0, "level01.kv.fast": 0}
        add_block(tree, 2)
        assert_blocks(tree, [1, 2])


@pytest.mark.parametrize("name", ["tokens", "level01.summary", "level01.kv"])
def test_missing_bytes_are_reported(tmp_path, name):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        add_block(tree, 1)
    os.truncate(path / name, 15)
    for mode in ("r", "w"):
        with pytest.raises(TreeError, match=f"{name}.*15 bytes"):
            Tree.open(path, mode=mode)
    (path / name).unlink()
    with pytest.raises(TreeError, match=f"{name}.*0 bytes"):
        Tree.open(path)


def test_verify_finds_damage(tmp_path):
    path = tmp_path / "t"

    def damaged(statement, match):
        for name in path.iterdir() if path.exists() else ():
            name.unlink()
        with Tree.open(path, SPEC) as tree:
            add_block(tree, 1)
            add_block(tree, 2)
            with tree.begin() as t:
                t.append_tokens([5])
                t.add_document(kind="user", title="t", source=None, start=8, stop=9, ingest="fast")
        db = sqlite3.connect(path / "catalogue.sqlite")
        db.execute(statement)
        db.commit()
        db.close()
        with Tree.open(path, mode="r") as tree, pytest.raises(TreeError, match=match):
            tree.verify()

    damaged("UPDATE levels SET count = 7 WHERE level = 0", "2 nodes of level 1")
    damaged("UPDATE documents SET stop = 10 WHERE id = 2", "document 2 spans")
    damaged("UPDATE documents SET start = 7 WHERE id = 2", "documents 1 and 2 overlap")
    damaged("UPDATE documents SET sha256 = '' WHERE id = 2", "document 2")
    with (path / "tokens").open("r+b") as file:
        file.write(b"\x09")
    with Tree.open(path) as tree, pytest.raises(TreeError, match="document 1"):
        tree.verify()


def test_damaged_catalogue_is_one_line(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        for value in range(1, 5):
            add_block(tree, value)
    whole = (path / "catalogue.sqlite").read_bytes()
    refused = 0
    for page in range(0, len(whole), 4096):
        torn = bytearray(whole)
        torn[page : page + 4096] = os.urandom(4096)
        (path / "catalogue.sqlite").write_bytes(torn)
        for mode in ("r", "w"):
            refused += message_of(TreeError, open_and_verify, path, mode) is not None
    # Every page matters: each is read on opening or by the check.
    assert refused == 2 * len(whole) // 4096


def test_reader_sees_its_snapshot_while_a_writer_goes_on(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC, sync=False) as tree:
        add_block(tree, 1)
        before = {p.name for p in path.iterdir()}
        reader = Tree.open(path, SPEC, mode="r")
        assert {p.name for p in path.iterdir()} == before
        for value in range(2, 40):
            add_block(tree, value)
        with tree.begin() as t:
            t.append_nodes(2, torch.ones(3, 6), contextual=False)
            t.append_tokens([1])
            t.add_document(kind="user", title="late", source=None, start=156, stop=157, ingest="fast")
            with Tree.open(path, mode="r") as other:
                assert other.length == 156
        assert_blocks(reader, [1])
        assert (reader.n_levels, reader.count(2)) == (1, 0)
        for write in (reader.begin,):
            with pytest.raises(TreeError, match="reading"):
                write()
        with pytest.raises(InputError):
            reader.tokens(0, 5)
        reader.refresh()
        assert (reader.length, reader.count(1), reader.n_levels) == (157, 39, 2)
        assert torch.equal(reader.summaries(2), torch.ones(3, 6))
        assert reader.document_at(156).title == "late"
        assert reader.documents() == tree.documents()
        assert reader.state("last") == b"39"
        reader.refresh()
        reader.verify()
    # The writer is gone, and what it cut on closing was not the reader's.
    assert reader.tokens().tolist()[-5:] == [39] * 4 + [1]
    reader.close()


def test_closed_tree_is_read_without_any_file_beside_it(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        add_block(tree, 1)
    names = {p.name: p.stat().st_mtime_ns for p in path.iterdir()}
    assert not any("-wal" in name or "-shm" in name for name in names)
    with Tree.open(path, mode="r") as reader:
        assert_blocks(reader, [1])
        assert {p.name: p.stat().st_mtime_ns for p in path.iterdir()} == names


def test_readers_never_stumble_over_writers_that_come_and_go(tmp_path):
    path = tmp_path / "t"
    Tree.open(path, SPEC).close()
    stop, seen, errors = threading.Event(), [], []

    def read():
        last = 0
        while not stop.is_set():
            try:
                with Tree.open(path, mode="r") as reader:
                    count = reader.count(1)
                    assert count >= last
                    assert reader.summaries(1)[:, 0].tolist() == [float(i) for i in range(count)]
                    last = count
                    seen.append(count)
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for value in range(40):
        with Tree.open(path, sync=value % 2 == 0) as tree:
            add_block(tree, value)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(set(seen)) > 3


def test_a_file_that_is_cut_while_it_is_being_mapped(tmp_path, monkeypatch):
    """Its length is asked for, a writer cuts it down to what is committed, and only then is it mapped."""
    with Tree.open(tmp_path / "t", SPEC) as tree:
        add_block(tree, 1)
    fstat = os.fstat
    with Tree.open(tmp_path / "t", mode="r") as reader:
        sizes_seen = []

        def before_the_cut(fd):
            sizes_seen.append(fstat(fd).st_size)
            return SimpleNamespace(st_size=1 << 20)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", before_the_cut)
            tokens = reader.tokens()
        assert sizes_seen[0] == 16
        assert tokens.tolist() == [1] * 4


def in_another_process(code, *args):
    environment = {**os.environ, "PYTHONPATH": str(Path(mc_runtime.__file__).parents[1])}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def test_one_writer(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        add_block(tree, 1)
        with pytest.raises(TreeLockedError, match=f"pid {os.getpid()}.*close"):
            Tree.open(path)
        add_block(tree, 2)
    code = """if True:
        import sys
        from mc_runtime.tree import Tree
        tree = Tree.open(sys.argv[1])
        print("open", flush=True)
        sys.stdin.read()
    """
    other = in_another_process(code, path)
    try:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(TreeLockedError) as error:
            Tree.open(path)
        assert f"process {other.pid}" in str(error.value)
        assert 'mode="r"' in str(error.value)
        assert "\n" not in str(error.value)
        with Tree.open(path, mode="r") as reader:
            assert_blocks(reader, [1, 2])
    finally:
        other.kill()
        other.communicate()
    # The lock dies with its holder, and what the killed writer left in the directory is no obstacle to either mode.
    with Tree.open(path, mode="r") as reader:
        assert_blocks(reader, [1, 2])
    with Tree.open(path) as tree:
        assert_blocks(tree, [1, 2])


def test_a_forked_child_cannot_harm_its_parents_transaction(tmp_path):
    with Tree.open(tmp_path / "t", SPEC, sync=False) as tree:
        add_block(tree, 1)
        with tree.begin() as t:
            t.append_tokens([2] * 4)
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    with pytest.raises(TreeError, match="forked"):
                        t.append_tokens([9])
                    with pytest.raises(KeyError):
                        t.__exit__(KeyError, KeyError(), None) or (_ for _ in ()).throw(KeyError)
                    assert tree.tokens().tolist() == [1] * 4
                    with pytest.raises(TreeError, match="forked"):
                        tree.begin()
                    tree.close()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            with pytest.raises(TreeLockedError):
                Tree.open(tree.path)
        assert tree.tokens().tolist() == [1] * 4 + [2] * 4
        assert sizes(tree.path)["tokens"] >= 32
    with Tree.open(tree.path) as tree:
        assert tree.tokens().tolist() == [1] * 4 + [2] * 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_directories_that_may_not_be_used(tmp_path):
    path = tmp_path / "t"
    with Tree.open(path, SPEC) as tree:
        add_block(tree, 1)
    path.chmod(0o555)
    try:
        with Tree.open(path, mode="r") as reader:
            assert_blocks(reader, [1])
        path.chmod(0)
        for mode in ("r", "w"):
            with pytest.raises(TreeError, match="Permission denied"):
                Tree.open(path, SPEC, mode=mode)
    finally:
        path.chmod(0o755)
