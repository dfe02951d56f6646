"""Ingest as a transaction: progress, and what remains of one that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import bring_in, check_session, kv_by_rank, words
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.errors import InputError
from mc_runtime.tree import Tree

Memory = Callable[..., Session]


@pytest.mark.parametrize("mode", ["contextual", "fast"])
def test_progress_is_monotone_and_ends_at_the_total(memory: Memory, mode: Any) -> None:
    session = memory()
    for length in (500, 3, 1, 8, 77):
        calls: list[int] = []
        session.ingest([65] * length, mode=mode, progress=calls.append)
        assert calls == sorted(calls)
        assert calls[0] >= 0
        assert calls[-1] == length
    calls = []
    session.ingest([65] * 300, progress=calls.append)
    assert len(set(calls)) > 3


class Stop(Exception):
    pass


def sizes(tree: Tree) -> tuple[int, ...]:
    return tree.length, tree.count(1), tree.count(2), len(tree.documents())


@pytest.mark.parametrize("mode", ["contextual", "fast"])
def test_an_ingest_that_breaks_off_leaves_all_as_it_was(memory: Memory, mode: Any) -> None:
    session, twin = memory("one"), memory("two")
    for s in (session, twin):
        s.ingest(words(333))
        s.generate("who?", max_new_tokens=5)
    tree = session.tree
    before = sizes(tree)
    kv = kv_by_rank(session.context)

    def progress(done: int) -> None:
        if done > 200 or mode == "fast":
            raise Stop

    with pytest.raises(Stop):
        session.ingest(words(600, seed=1), mode=mode, progress=progress)
    assert sizes(tree) == before
    for was, now in zip(kv, kv_by_rank(session.context), strict=True):
        assert torch.equal(was, now)
    check_session(session)
    tree.verify()
    for s in (session, twin):  # it goes on as one in which nothing broke off
        s.ingest(words(600, seed=2), mode=mode)
    one, two = (s.generate("and now?", max_new_tokens=12) for s in (session, twin))
    assert one == two
    assert torch.equal(tree.summaries(2), twin.tree.summaries(2))


@pytest.mark.parametrize("mode", ["contextual", "fast"])
def test_embeddings_that_are_not_finite_are_refused(memory: Memory, mode: Any) -> None:
    model = tiny_model()
    session = memory(model=model)
    session.ingest(words(100))
    session.generate("who?", max_new_tokens=3)
    before = sizes(session.tree)
    good = model.decoder.embedding[ord("z")].clone()
    model.decoder.embedding.data[ord("z")] = float("nan")
    ids = list(words(300).encode())
    ids[150] = ord("z")
    with pytest.raises(InputError, match=r"of node \d+ .* is not finite") as error:
        session.ingest(ids, mode=mode)
    assert "\n" not in str(error.value)
    assert sizes(session.tree) == before
    model.decoder.embedding.data[ord("z")] = good
    session.tree.verify()
    session.ingest(ids, mode=mode)
    bring_in(session)
    assert all(x.isfinite().all() for x in kv_by_rank(session.context))
