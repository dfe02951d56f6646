"""Focus policies: what they answer, and what a session makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from checks import bring_in, check_session, words

from mc_runtime import Session
from mc_runtime.context import WorkingContext
from mc_runtime.focus import (
    AttentionPolicy,
    BlendPolicy,
    FocusPolicy,
    FocusView,
    RecencyPolicy,
    RetrievalPolicy,
    Utilities,
    make_policy,
)
from mc_runtime.focus.retrieval import holds

Memory = Callable[..., Session]
FACT = " The violet lighthouse is kept by Agnes. "


class Watched:
    """A policy that checks what another answers, and keeps it."""

    def __init__(self, inner: FocusPolicy) -> None:
        self.inner, self.needs_mass = inner, inner.needs_mass
        self.views: list[tuple[str, int, bool]] = []
        self.answers: list[Utilities] = []

    def utilities(self, view: FocusView) -> Utilities:
        context = view.context
        if view.mass is not None:
            layers, heads = context.decoder.config.n_layers, context.decoder.config.n_heads
            assert view.mass.shape == (layers, context.used)
            per_query = view.mass.sum(1) / heads
            assert np.allclose(per_query, np.round(per_query[0]), atol=1e-3)  # each query's attention adds up to one
        answer = self.inner.utilities(view)
        for level, (nodes, nats) in answer.items():
            assert 1 <= level <= context.tree.n_levels
            assert nodes.dtype == np.int64
            assert (np.diff(nodes) > 0).all()
            assert nodes.min() >= 0
            assert nodes.max() < context.tree.count(level)
            assert nats.shape == nodes.shape
            assert np.isfinite(nats).all()
        self.views.append((view.query, context.used, view.mass is not None))
        self.answers.append(answer)
        return answer


@pytest.mark.parametrize("name", ["blend", "retrieval", "recency", "attention", "retrieval+recency", "hindsight"])
def test_utilities_are_finite_sorted_and_of_stored_nodes(memory: Memory, name: str) -> None:
    policy = Watched(make_policy(name))
    session = memory(policy=policy)
    session.generate("nothing is stored yet", max_new_tokens=9)
    session.ingest(words(300))
    session.ingest(words(200, seed=1), mode="fast")
    session.generate("what of the dog?", max_new_tokens=30)
    session.focus_on("bread on the hill")
    session.focus_on((20, 60))
    session.generate(["the lamp?", "rain"], max_new_tokens=10)
    assert len(policy.answers) >= 8
    assert any(policy.answers)
    assert {query[:16] for query, _, _ in policy.views} >= {"what of the dog?", "bread on the hil", "", "rain"}
    assert any(with_mass for _, _, with_mass in policy.views) == (name in ("blend", "attention", "hindsight"))
    check_session(session)


def test_mass_is_only_asked_for_where_it_is_used(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    plain = WorkingContext.append

    def append(self: WorkingContext, ids: list[int], *, return_mass: bool = False, **rest: bool):
        asked.append(return_mass)
        return plain(self, ids, return_mass=return_mass, **rest)

    monkeypatch.setattr(WorkingContext, "append", append)
    memory("a", policy="retrieval").generate("hello", max_new_tokens=9)
    assert not any(asked)
    memory("b", policy="attention").generate("hello", max_new_tokens=9)
    assert sum(asked) >= 10


class Wants:
    """Gives one node a value."""

    needs_mass = False

    def __init__(self, level: int, index: int, nats: float) -> None:
        self.answer = {level: (np.array([index]), np.array([nats]))}

    def utilities(self, view: FocusView) -> Utilities:
        return self.answer


def test_a_policy_of_your_own_decides(memory: Memory) -> None:
    session = memory(policy=Wants(1, 37, 1.0))
    session.ingest(words(600))
    session.generate("hello", max_new_tokens=2)
    tokens = session.context.entries.index[session.context.entries.levels == 0]
    assert set(range(37 * 8, 38 * 8)) <= set(tokens.tolist())
    assert session.stats().turns[0].expanded >= 1
    worthless = memory("other", policy=Wants(1, 37, 0.001))  # below the least gain
    worthless.ingest(words(600))
    worthless.generate("hello", max_new_tokens=2)
    tokens = worthless.context.entries.index[worthless.context.entries.levels == 0]
    assert not set(range(37 * 8, 38 * 8)) & set(tokens.tolist())
    ahead = memory("ahead", policy=Wants(3, 10**6, 1.0))  # a node that does not exist
    ahead.generate("hello", max_new_tokens=2)


def test_a_new_turn_closes_what_is_of_no_use_any_more(memory: Memory) -> None:
    """Although there is room, and although it has only just been opened."""
    session = memory(policy=Wants(1, 37, 1.0))
    session.ingest(words(600))
    for block in (37, 50):
        session.focus.policy = Wants(1, block, 1.0)
        session.generate("hello", max_new_tokens=2)
        shown = session.context.entries
        tokens = set(shown.index[shown.levels == 0].tolist())
        assert {37: 37 * 8, 50: 50 * 8}[block] in tokens
        assert session.context.used < 150
    assert 37 * 8 not in tokens
    check_session(session)


def test_retrieval_expands_a_planted_fact(memory: Memory) -> None:
    session = memory(policy=RetrievalPolicy(), block_size=32, budget=256)
    document = session.ingest(words(900, seed=1) + FACT + words(900, seed=2))
    session.ingest(words(200, seed=3))
    at = session.tree.tokens().tolist()
    needle = session.model.tokenizer.encode("violet")
    start = next(i for i in range(document.start, document.stop) if at[i : i + 6] == needle)
    bring_in(session)
    shown = session.context.entries
    assert start not in shown.index[shown.levels == 0]
    session.generate("violet?", max_new_tokens=2)
    shown = session.context.entries
    assert {start, start + 5} <= set(shown.index[shown.levels == 0].tolist())


def test_retrieval_opens_what_is_repeated_once(memory: Memory) -> None:
    """Word for word, wherever its blocks begin; not what says something else in the same words."""
    session = memory(policy=RetrievalPolicy(), block_size=32, budget=400)
    told = words(90, seed=70) + " The violet lamp has number {} today. " + words(90, seed=80)
    spans = {}
    for name, number in (("first", 27), ("again", 27), ("changed", 28), ("once more", 27)):
        before = words(317 if name == "again" else 320, seed=len(spans))
        start = session.ingest(before + told.format(number) + words(300, seed=9 + len(spans))).start + len(before)
        spans[name] = range(start // 32, (start + len(told)) // 32 + 1)
    query = "What number has the violet lamp today?"
    scores = session.retrieval.ranked(query)
    assert all(max(scores[block] for block in span) > 0.5 * scores.max() for span in spans.values())
    opened = {
        passages: set(RetrievalPolicy(passages=passages).utilities(view_of(session, query))[1][0].tolist())
        for passages in (1, 2, 4)
    }
    found = {
        passages: {name for name, span in spans.items() if blocks & set(span)} for passages, blocks in opened.items()
    }
    assert [len(found[passages]) for passages in (1, 2, 4)] == [1, 2, 2]
    assert "changed" in found[2]
    assert len(opened[4]) > 6  # what matches less has the place of the repetitions


@pytest.mark.parametrize(
    ("text", "part", "found"),
    [
        ([1, 2, 3, 4], [2, 3], True), ([1, 2, 3, 4], [1, 2, 3, 4], True), ([1, 2, 1, 3], [1, 3], True),
        ([1, 2, 3], [3, 4], False), ([1, 2, 3], [1, 3], False), ([1, 2], [1, 2, 3], False), ([], [1], False),
    ],
)  # fmt: skip
def test_what_a_text_holds(text: list[int], part: list[int], found: bool) -> None:
    assert holds(np.array(text, np.uint32), np.array(part, np.uint32)) == found


def view_of(session: Session, query: str = "", mass: np.ndarray | None = None) -> FocusView:
    context = bring_in(session)
    return FocusView(context, context.synced_expanded(), query, mass, session.retrieval, session.context.length)


def test_recency_prefers_the_newest(memory: Memory) -> None:
    session = memory()
    session.ingest(words(900))
    nodes, nats = RecencyPolicy(scale=2.0, half_life=4.0).utilities(view_of(session))[1]
    assert nodes[-1] == session.tree.count(1) - 1
    assert nats[-1] == 2.0
    assert (np.diff(nats) > 0).all()
    assert nats[-5] == 1.0


def test_attention_speaks_for_gists_and_for_parents(memory: Memory) -> None:
    session = memory()
    session.ingest(words(900))
    view = view_of(session)
    entries = view.context.entries
    gist = int((entries.levels == 1).nonzero()[0][2])
    token = int((entries.levels == 0).nonzero()[0][-1])
    mass = np.zeros((3, len(entries)))
    mass[:, gist], mass[:, 0], mass[1, token] = 4.0, 100.0, 3.0
    answer = AttentionPolicy(scale=2.0).utilities(view_of(session, mass=mass))
    values = {(level, int(n)): float(x) for level, (nodes, v) in answer.items() for n, x in zip(nodes, v, strict=True)}
    index = int(entries.index[gist])
    assert values[1, index] == values[2, index // 8] == 2.0
    last = int(entries.index[token]) // 8
    if last < session.tree.count(1):
        assert values[1, last] == pytest.approx(0.5)
    assert (1, 0) not in values  # the sink
    assert AttentionPolicy().utilities(view) == {}
    assert AttentionPolicy().utilities(view_of(session, mass=np.zeros((3, len(entries))))) == {}


def test_retrieval_is_silent_without_words_or_hits(memory: Memory) -> None:
    session = memory()
    session.ingest(words(300))
    assert RetrievalPolicy().utilities(view_of(session)) == {}
    assert RetrievalPolicy().utilities(view_of(session, "zebra")) == {}
    assert RetrievalPolicy().utilities(view_of(session, "the dog"))


def test_a_blend_is_the_weighted_sum(memory: Memory) -> None:
    session = memory()
    session.ingest(words(300))
    view = view_of(session, "dog")
    one, two = Wants(1, 3, 1.0), RecencyPolicy()
    blend = BlendPolicy([(0.5, one), (2.0, two), (0.0, AttentionPolicy())])
    assert not blend.needs_mass
    nodes, nats = blend.utilities(view)[1]
    expected = dict(zip(*(x.tolist() for x in two.utilities(view)[1]), strict=True))
    assert nodes.tolist() == sorted(expected)
    for node, value in zip(nodes.tolist(), nats, strict=True):
        assert value == pytest.approx(2 * expected[node] + (0.5 if node == 3 else 0))


def test_a_blend_keeps_close_to_the_best_for_a_question(memory: Memory) -> None:
    session = memory()
    session.ingest(words(300))
    view = view_of(session, "dog")
    parts = [(1.0, Wants(1, 3, 1.0)), (1.0, Wants(1, 3, 0.2)), (1.0, Wants(1, 4, 0.7)), (1.0, Wants(1, 5, 0.5))]
    for asked, nearly, expected in (
        (False, 0.5, {3: 1.2, 4: 0.7, 5: 0.5}),
        (True, 0.5, {3: 1.2, 4: 0.7, 5: 0.0}),
        (True, 0.0, {3: 1.2, 4: 0.7, 5: 0.5}),
    ):
        nodes, nats = BlendPolicy(parts, nearly=nearly).utilities(replace(view, asked=asked))[1]
        assert dict(zip(nodes.tolist(), nats.tolist(), strict=True)) == pytest.approx(expected)
    assert BlendPolicy([(1.0, RetrievalPolicy())], nearly=0.5).utilities(replace(view_of(session), asked=True)) == {}
    # What keeping a coarse node open is worth is summed over much text: no measure for a passage.
    for level in (2, 3):
        u = BlendPolicy([*parts, (1.0, Wants(level, 0, 4.0))], nearly=0.5).utilities(replace(view, asked=True))
        assert dict(zip(u[1][0].tolist(), u[1][1].tolist(), strict=True)) == pytest.approx({3: 1.2, 4: 0.7, 5: 0.0})
        assert u[level][1].tolist() == [4.0]
