"""The hindsight policy against losses that are computed one token at a time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from checks import bring_in, check_session, counted_forwards, kv_by_rank, words

from mc_runtime import Session
from mc_runtime.focus import FocusView, HindsightPolicy, RecencyPolicy
from mc_runtime.focus.hindsight import recency_weights

Memory = Callable[..., Session]


def view_of(session: Session) -> FocusView:
    context = session.context
    recent = context.length - session.config.recent_tokens
    return FocusView(context, context.synced_expanded(), "", None, session.retrieval, recent)


def test_blocks_are_worth_what_they_would_have_saved(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory(budget=160, recent_tokens=24)
    session.ingest(words(700))
    session.focus_on((100, 130))
    context, tokens, decay = session.context, 20, 5.0
    policy = HindsightPolicy(tokens, decay, candidates=40, shortlist=RecencyPolicy())
    view = view_of(session)
    before = kv_by_rank(context)
    with counted_forwards(monkeypatch) as forwards:
        nodes, nats = policy.utilities(view)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, kv_by_rank(context), strict=True))
    assert not context.pending
    opened = view.expanded[1]
    kept = opened[(opened > 0) & (opened < view.recent_start // 8)]
    assert {13, 14, 15} <= set(kept.tolist())
    assert set(kept.tolist()) <= set(nodes.tolist())
    tried = np.setdiff1d(nodes, kept)
    assert 0 < len(tried) <= 40
    assert len(forwards) == 1 + len(kept) + 2 * len(tried)
    above = view.expanded.get(2, np.zeros(0, np.int64))
    assert any(node // 8 not in above for node in tried), "none lies under a gist of level 2"

    def loss(expanded: dict[int, np.ndarray]) -> float:
        """By hand: the newest tokens run again one by one, each on what the ones before it have left."""
        branch = context.fork(context.cache.widened(300))
        ids = session.tree.tokens()[-tokens:].tolist()
        nll = []
        with torch.inference_mode():
            branch.relayout(expanded, mode="none")
            for rank, (_, after) in zip(range(branch.used - tokens, branch.used), pairwise(ids), strict=False):
                logits = context.decoder.logits(branch.run(np.array([rank])).hidden[0, 0])
                nll.append(-float(logits.double().log_softmax(0)[after]))
        weights = [np.exp(-age / decay) for age in range(tokens - 2, -1, -1)]
        return float(np.dot(nll, weights) / np.sum(weights))

    base = loss(view.expanded)
    for node, value in list(zip(nodes.tolist(), nats, strict=True))[::5]:
        changed = {level: index.copy() for level, index in view.expanded.items()}
        if node in opened:
            changed[1] = np.setdiff1d(changed[1], [node])
            assert value == pytest.approx(loss(changed) - base, abs=1e-4)
        else:
            changed[1] = np.union1d(changed[1], [node])
            for level in range(2, session.tree.n_levels + 1):
                parent = node // 8 ** (level - 1)
                if parent < session.tree.count(level):
                    changed[level] = np.union1d(changed.get(level, np.zeros(0, np.int64)), [parent])
            assert value == pytest.approx(base - loss(changed), abs=1e-4)
    assert np.ptp(nats) > 1e-4


def test_newer_tokens_count_more() -> None:
    weights = recency_weights(40, 16.0)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[:-16] / weights[16:], np.exp(-1))


def test_no_more_gists_are_tried_than_asked_for(memory: Memory) -> None:
    session = memory(budget=160)
    session.ingest(words(700))
    bring_in(session)
    view = view_of(session)
    nodes, _ = HindsightPolicy(16, candidates=3, shortlist=RecencyPolicy()).utilities(view)[1]
    assert len(np.setdiff1d(nodes, view.expanded[1])) == 3


def test_a_history_too_short_to_judge_by_has_no_utilities(memory: Memory) -> None:
    session = memory(policy="hindsight")
    assert HindsightPolicy().utilities(view_of(session)) == {}  # nothing is laid out yet
    session.generate("what of the dog?", max_new_tokens=12)
    check_session(session)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 1}, "tokens: expected at least 2"),
        ({"decay": 0.0}, "decay: expected a positive"),
        ({"candidates": 0}, "candidates: expected at least 1"),
    ],
)
def test_settings_are_checked(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HindsightPolicy(**settings)
