"""The oracle policy against losses that are computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from checks import bring_in, counted_forwards, kv_by_rank, words

from mc_runtime import Session
from mc_runtime.focus import FocusView, OraclePolicy
from mc_runtime.focus.allocator import FocusParams

Memory = Callable[..., Session]


def test_the_oracle_measures_what_an_edit_is_worth(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(budget=160)
    session.ingest(words(400))
    session.focus_on((100, 130))
    context = session.context
    targets = list(words(20, seed=3).encode())
    before = kv_by_rank(context)
    policy = OraclePolicy(targets)
    view = FocusView(context, context.synced_expanded(), "", None, session.retrieval, session.context.length)
    with counted_forwards(monkeypatch) as forwards:
        nodes, nats = policy.utilities(view)[1]
    assert len(forwards) >= len(nodes) + 1
    assert all(torch.equal(a, b) for a, b in zip(before, kv_by_rank(context), strict=True))
    assert not context.pending

    def nll(expanded: dict[int, np.ndarray]) -> float:
        """By hand, in a cache of its own, one token at a time."""
        branch = context.fork(context.cache.widened(256))
        with torch.inference_mode():
            branch.relayout(expanded, mode="none")
            total = 0.0
            for token, after in pairwise(targets):
                logits = context.decoder.logits(branch.append([token]).hidden[0, 0])
                total -= float(logits.double().log_softmax(0)[after])
        return total / (len(targets) - 1)

    base = nll(context.expanded)
    gists = set(context.entries.index[context.entries.levels == 1].tolist())
    opened = set(context.expanded[1].tolist())
    assert gists <= set(nodes.tolist())
    assert 0 not in nodes
    assert {13, 14, 15} <= set(nodes.tolist()) & opened
    for node, value in zip(nodes.tolist(), nats, strict=True):
        if node in gists:
            changed = {**context.expanded, 1: np.union1d(context.expanded[1], [node])}
            assert value == pytest.approx(base - nll(changed), abs=1e-4)
        else:
            changed = {**context.expanded, 1: np.setdiff1d(context.expanded[1], [node])}
            assert value == pytest.approx(nll(changed) - base, abs=1e-4)
    assert np.ptp(nats) > 1e-3
    with pytest.raises(ValueError, match="at least two"):
        OraclePolicy([1])


def test_one_edit_of_the_oracle_gains_what_it_said(memory: Memory) -> None:
    targets = list(words(24, seed=5).encode())
    params = FocusParams(min_gain=0.0, hysteresis=0.0, max_edits=1)
    session = memory(policy=OraclePolicy(targets), refresh="none", focus=params)
    session.ingest(words(500))
    context = bring_in(session)

    def loss() -> float:
        branch = context.fork(context.cache.widened(300))
        logits = context.decoder.logits(branch.append(targets).hidden[0, :-1])
        return float(torch.nn.functional.cross_entropy(logits, torch.tensor(targets[1:])))

    with torch.inference_mode():
        opened, before = context.expanded[1], loss()
        report = session.focus.refocus(context, query="", reserve=0)
        after = loss()
    nodes, nats = session.focus.utility[1]
    assert (report.expanded, report.collapsed) == (1, 0)
    closed = ~np.isin(nodes, opened)
    best = float(nats[closed].max())
    assert best > 1e-3
    assert np.setdiff1d(context.expanded[1], opened).tolist() == nodes[closed & (nats == best)].tolist()
    assert before - after == pytest.approx(best, abs=1e-4)
