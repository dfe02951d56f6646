"""Random sequences of changes, roll-backs and re-openings against a model in memory."""

import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from mc_runtime.errors import InputError
from mc_runtime.tree import NodeFlag, Tree, TreeSpec
from mc_runtime.tree.flags import FlagRuns

K = 2
SPEC = TreeSpec(K, 2, 1, 1, 2, "float32", 50, "m", "t", "g")
ALL = NodeFlag.KV | NodeFlag.CONTEXTUAL | NodeFlag.HIDDEN


class Content:
    """A tree in memory: nodes are [flags, summary, hidden, k, v] numbers, documents [start, stop]."""

    def __init__(self):
        self.tokens, self.levels, self.documents, self.state = [], {}, {}, {}

    def copy(self):
        other = Content()
        other.tokens = self.tokens.copy()
        other.levels = {level: [node.copy() for node in nodes] for level, nodes in self.levels.items()}
        other.documents = {id: span.copy() for id, span in self.documents.items()}
        other.state = self.state.copy()
        return other

    def count(self, level):
        return len(self.levels.get(level, ())) if level else len(self.tokens)

    def free(self, start, stop, skip=None):
        spans = [span for id, span in self.documents.items() if id != skip]
        return all(a == b or stop <= a or b <= start for a, b in spans) or start == stop


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.tree = Tree.open(self.root / "t", SPEC, sync=False)
        self.reader = Tree.open(self.root / "t", mode="r")
        self.committed, self.seen, self.content = Content(), Content(), Content()
        self.transaction = None
        self.number = 0

    def teardown(self):
        self.tree.close()
        self.reader.close()
        shutil.rmtree(self.root)

    def numbers(self, n):
        self.number += n
        return [float(x) for x in range(self.number - n, self.number)]

    def rows(self, values, *shape):
        return torch.tensor(values).reshape(-1, *([1] * len(shape))).expand(-1, *shape)

    @precondition(lambda self: self.transaction is None)
    @rule()
    def begin(self):
        self.transaction = self.tree.begin().__enter__()
        self.content = self.committed.copy()

    @precondition(lambda self: self.transaction is not None)
    @rule(keep=st.sampled_from([True, True, True, False]))
    def end(self, keep):
        if keep:
            self.transaction.__exit__(None, None, None)
            self.committed = self.content
        else:
            self.transaction.__exit__(KeyError, KeyError(), None)
        self.transaction = None

    @precondition(lambda self: self.transaction is not None)
    @rule(ids=st.lists(st.integers(0, 49), max_size=40))
    def tokens(self, ids):
        span = self.transaction.append_tokens(ids)
        assert span == (len(self.content.tokens), len(self.content.tokens) + len(ids))
        self.content.tokens += ids

    @precondition(lambda self: self.transaction is not None)
    @rule(level=st.integers(1, 4), n=st.integers(0, 6), kind=st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7]))
    def nodes(self, level, n, kind):
        count = self.content.count
        s, h, k, v = (self.numbers(n) for _ in range(4))
        rest = {"contextual": bool(kind & NodeFlag.CONTEXTUAL)}
        if kind & NodeFlag.HIDDEN:
            rest["hidden"] = self.rows(h, 2)
        if kind & NodeFlag.KV:
            rest |= {"k": self.rows(k, 1, 1, 2), "v": self.rows(v, 1, 1, 2)}
        try:
            self.transaction.append_nodes(level, self.rows(s, 2), **rest)
        except InputError:
            assert count(level) + n > count(level - 1) // K
            return
        assert count(level) + n <= count(level - 1) // K
        self.content.levels.setdefault(level, []).extend([kind, *row] for row in zip(s, h, k, v, strict=True))

    @precondition(lambda self: self.transaction is not None)
    @rule(level=st.integers(1, 3), start=st.integers(0, 12), n=st.integers(0, 3))
    def upgrade(self, level, start, n):
        nodes = self.content.levels.get(level, [])
        h, k, v = (self.numbers(n) for _ in range(3))
        part = nodes[start : start + n]
        legal = start + n <= len(nodes) and not any(node[0] & NodeFlag.CONTEXTUAL for node in part)
        rows = {"hidden": self.rows(h, 2), "k": self.rows(k, 1, 1, 2), "v": self.rows(v, 1, 1, 2)}
        try:
            self.transaction.upgrade_nodes(level, start, **rows)
        except InputError:
            assert not legal
            return
        assert legal
        for node, *new in zip(part, h, k, v, strict=True):
            node[0], node[2:] = ALL, new

    @precondition(lambda self: self.transaction is not None)
    @rule(start=st.integers(0, 60), length=st.integers(0, 20))
    def document(self, start, length):
        legal = start + length <= len(self.content.tokens) and self.content.free(start, start + length)
        try:
            made = self.transaction.add_document(
                kind="user", title="t", source=None, start=start, stop=start + length, ingest="fast"
            )
        except InputError:
            assert not legal
            return
        assert legal
        assert made.id not in self.content.documents
        self.content.documents[made.id] = [start, start + length]

    @precondition(lambda self: self.transaction is not None and self.content.documents)
    @rule(data=st.data(), more=st.integers(-1, 20))
    def extend(self, data, more):
        id = data.draw(st.sampled_from(sorted(self.content.documents)))
        start, stop = self.content.documents[id]
        legal = more >= 0 and stop + more <= len(self.content.tokens) and self.content.free(start, stop + more, id)
        try:
            self.transaction.extend_document(id, stop + more)
        except InputError:
            assert not legal
            return
        assert legal
        self.content.documents[id] = [start, stop + more]

    @precondition(lambda self: self.transaction is not None)
    @rule(key=st.sampled_from("ab"), value=st.none() | st.binary(max_size=4))
    def state(self, key, value):
        self.transaction.set_state(key, value)
        self.content.state[key] = value

    @precondition(lambda self: self.transaction is None)
    @rule()
    def reopen(self):
        self.tree.close()
        self.tree = Tree.open(self.root / "t", sync=False)
        self.tree.verify()

    @rule()
    def refresh(self):
        self.reader.refresh()
        self.seen = self.committed
        self.reader.verify()

    @invariant()
    def agrees(self):
        self.compare(self.tree, self.committed)
        if self.transaction is not None:
            assert self.transaction.length == len(self.content.tokens)
            assert [self.transaction.count(i) for i in range(6)] == [self.content.count(i) for i in range(6)]

    @invariant()
    def snapshot_agrees(self):
        # Documents of a snapshot are brought forward in place, all else stays.
        self.compare(self.reader, self.seen)

    def compare(self, tree, content):
        assert tree.tokens().tolist() == content.tokens
        assert [tree.count(i) for i in range(6)] == [content.count(i) for i in range(6)]
        assert tree.n_levels == max((level for level, nodes in content.levels.items() if nodes), default=0)
        for level, nodes in content.levels.items():
            assert tree.flags(level).tolist() == [node[0] for node in nodes]
            assert tree.summaries(level)[:, 1].tolist() == [node[1] for node in nodes]
            with_kv = [i for i, node in enumerate(nodes) if node[0] & NodeFlag.KV][::-1]
            k, v = tree.kv(level, with_kv)
            assert k[:, 0, 0, 1].tolist() == [nodes[i][3] for i in with_kv]
            assert v[:, 0, 0, 0].tolist() == [nodes[i][4] for i in with_kv]
            first = next((i for i, node in enumerate(nodes) if not node[0] & NodeFlag.HIDDEN), len(nodes))
            assert tree.hidden(level, 0, first)[:, 0].tolist() == [node[2] for node in nodes[:first]]
        spans = {d.id: [d.start, d.stop] for d in tree.documents()}
        assert spans == content.documents
        for document in tree.documents():
            part = np.array(content.tokens[document.start : document.stop], "<u4")
            assert document.sha256 == hashlib.sha256(part.tobytes()).hexdigest()
        for token in range(len(content.tokens)):
            found = tree.document_at(token)
            assert (found and found.id) == next((i for i, (a, b) in spans.items() if a <= token < b), None)
        assert [tree.state(key) for key in "ab"] == [content.state.get(key) for key in "ab"]


def test_any_sequence_of_changes():
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=8),
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 7)), max_size=8),
    st.integers(0, 7),
    st.integers(0, 7),
)
def test_flag_runs(appended, assigned, mask, wanted):
    runs, flat = FlagRuns(), []
    for n, value in appended:
        runs.append(n, value)
        flat += [value] * n
    stored = dict(zip(runs.starts, runs.values, strict=True))
    runs = runs.copy()
    for a, b, value in assigned:
        start, stop = sorted((min(a, len(flat)), min(b, len(flat))))
        runs.assign(start, stop, value)
        flat[start:stop] = [value] * (stop - start)
        assert runs.span(0, len(flat)).tolist() == flat
        assert runs.span(start, stop).tolist() == flat[start:stop]
    assert all(a != b for a, b in zip(runs.values, runs.values[1:], strict=False))
    if flat:
        index = np.arange(len(flat))[::-1]
        assert runs.at(index).tolist() == flat[::-1]
    matching = [i for i, value in enumerate(flat) if value & mask == wanted]
    assert runs.extent(mask, wanted) == (matching[-1] + 1 if matching else 0)
    # What is touched is enough to bring a stored copy up to date.
    for start in runs.touched:
        value = runs.run_at(start)
        if value is None:
            stored.pop(start, None)
        else:
            stored[start] = value
    again = FlagRuns.load(len(flat), sorted(stored.items()))
    assert again.span(0, len(flat)).tolist() == flat
