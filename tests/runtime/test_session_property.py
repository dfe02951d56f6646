"""Whatever is done to a memory, in whatever order: budget, layout, cache and tree stay sound at every step."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from checks import SMALL, check_session, kv_by_rank, relative_error, watched, words
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.errors import BudgetError

MODEL = tiny_model()

SEED = st.integers(0, 99)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ingest"), st.integers(5, 400), SEED),
        st.tuples(st.just("ingest fast"), st.integers(5, 300), SEED),
        st.tuples(st.just("generate"), st.integers(1, 24), SEED),
        st.tuples(st.just("generate"), st.integers(1, 24), SEED),
        st.tuples(st.just("long prompt"), st.integers(100, 300), SEED),
        st.tuples(st.just("break off"), st.integers(1, 12), SEED),
        st.tuples(st.just("batch"), st.integers(1, 10), SEED),
        st.tuples(st.just("focus"), st.integers(1, 90), SEED),
        st.tuples(st.just("pin"), st.integers(1, 60), SEED),
        st.tuples(st.just("unpin"), st.just(0), SEED),
        st.tuples(st.just("reopen"), st.integers(150, 256), SEED),
        st.tuples(st.just("evidence"), st.integers(5, 60), SEED),
    ),
    min_size=2,
    max_size=9,
)
CONFIGS = st.fixed_dictionaries(
    {
        "gist_kind": st.sampled_from(["pooled", "projected", "embedding"]),
        "refresh": st.sampled_from(["none", "tail", "top", "full"]),
        "refresh_decode": st.sampled_from(["none", "tail", "top", "full"]),
        "policy": st.sampled_from(["blend", "retrieval", "recency", "attention", "retrieval+recency", "hindsight"]),
        "archive_kv": st.sampled_from([0, 5]),
        "budget": st.integers(150, 256),
    }
)


def span(session: Session, count: int, seed: int) -> tuple[int, int]:
    length = session.tree.length
    start = seed * length // 100
    return start, min(start + count, length)


def do(session: Session, what: str, count: int, seed: int) -> None:
    sampling: dict[str, Any] = {"temperature": 1.0, "seed": seed}
    if what.startswith("ingest"):
        session.ingest(words(count, seed), mode="fast" if "fast" in what else None)
    elif what == "generate":
        session.generate(words(20, seed), max_new_tokens=count, **sampling)
    elif what == "long prompt":
        session.generate(words(count, seed), max_new_tokens=2, **sampling)
    elif what == "break off":
        stream = session.generate(words(20, seed), stream=True, max_new_tokens=count + 10, **sampling)
        for _ in zip(range(count), stream, strict=False):
            pass
        stream.close()
    elif what == "batch":
        length = session.tree.length
        session.generate([words(15, seed), words(9, seed + 1)], max_new_tokens=count, **sampling)
        assert session.tree.length == length
    elif what == "focus":
        session.focus_on(span(session, count, seed) if seed % 2 else words(20, seed))
    elif what == "pin":
        # What is pinned may take what the recent text would need: refused, or room is left for a prompt in parts.
        pinned = sum(b - a for a, b in session.focus.pins)
        if pinned + count <= 40:
            session.pin(span(session, count, seed))
    elif what == "unpin":
        if session.focus.pins:
            session.unpin(session.focus.pins[seed % len(session.focus.pins)])
    elif what == "evidence":
        session.ingest_evidence([{"text": words(count, seed)}])
    else:
        raise AssertionError(what)


def check_gists(session: Session) -> None:
    """What stands in the cache for a gist is what the tree holds of it, wherever it came from."""
    context = session.context
    ranks = (context.entries.levels > 0).nonzero()[0]
    run = context.reader.runs(session.tree, context.entries.levels[ranks], context.entries.index[ranks])
    ranks = ranks[~run]  # what is run through the model depends on what stands before it
    if session.config.gist_kind == "embedding" or not len(ranks):
        return
    stored = context.reader.read(session.tree, context.entries.levels[ranks], context.entries.index[ranks])
    k, v = kv_by_rank(context)
    assert relative_error(k[:, :, ranks], stored.k) < 1e-6
    assert relative_error(v[:, :, ranks], stored.v) < 1e-6


@contextmanager
def scratch() -> Iterator[Path]:
    path = Path(mkdtemp())
    try:
        yield path
    finally:
        shutil.rmtree(path)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS, config=CONFIGS)
# Hindsight tries layouts of a history that has grown since the last one, and nothing has been closed for that yet.
@example(
    steps=[("long prompt", 288, 5), ("ingest", 19, 0), ("focus", 1, 0)],
    config={
        "gist_kind": "pooled", "refresh": "none", "refresh_decode": "none", "policy": "hindsight", "archive_kv": 0,
        "budget": 242,
    },
)  # fmt: skip
def test_every_sequence_of_calls_keeps_a_memory_sound(
    steps: list[tuple[str, int, int]], config: dict[str, Any]
) -> None:
    with scratch() as path, pytest.MonkeyPatch.context() as monkeypatch:
        session = Session.open(path, MODEL, **SMALL | config)
        try:
            for what, count, seed in steps:
                before = session.tree.length
                if what == "reopen":
                    session.close()
                    config["budget"] = count
                    session = Session.open(path, MODEL, **SMALL | config)
                    assert session.tree.length == before
                else:
                    with watched(monkeypatch, session):
                        try:
                            do(session, what, count, seed)
                        except BudgetError:
                            # Only pins, the head and the recent text may leave no room.
                            if not session.focus.pins and config["budget"] >= 170:
                                raise
                assert session.tree.length >= before
                assert not session.context.pending
                assert not session._streaming
                check_session(session)
                session.tree.verify()
            check_gists(session)
        finally:
            session.close()
