"""The Working Context against the plain model and against itself: what an edit must not change, and what it must."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from checks import bring_in, check_context, counted_forwards, greedy_logits, kv_by_rank, relative_error, words
from torch import Tensor

from mc_runtime import Session
from mc_runtime.context import WorkingContext
from mc_runtime.model import LoadedModel
from mc_runtime.turns import Turn

Memory = Callable[..., Session]
KINDS = ("pooled", "projected", "embedding")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def opened(context: WorkingContext, *nodes: tuple[int, int]) -> dict[int, np.ndarray]:
    """The context's expanded nodes and `nodes`."""
    extra: dict[int, list[int]] = {}
    for level, index in nodes:
        extra.setdefault(level, []).append(index)
    levels = set(context.expanded) | set(extra)
    none = np.zeros(0, np.int64)
    return {n: np.union1d(context.expanded.get(n, none), np.array(extra.get(n, []), np.int64)) for n in levels}


def state_of(context: WorkingContext) -> tuple[Tensor, Tensor, list[int], list[int]]:
    return (*kv_by_rank(context), context.entries.levels.tolist(), context.entries.index.tolist())


def assert_same(context: WorkingContext, before: tuple[Tensor, Tensor, list[int], list[int]]) -> None:
    after = state_of(context)
    assert after[2:] == before[2:]
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])
    check_context(context)


def collapsed_block(context: WorkingContext, nth: int = 0) -> int:
    """Index of the nth level-1 gist in the context."""
    return int(context.entries.index[context.entries.levels == 1][nth])


@pytest.mark.parametrize("kind", KINDS)
def test_all_tokens_in_view_is_the_plain_model(memory: Memory, model: LoadedModel, kind: str) -> None:
    session = memory(budget=512, gist_kind=kind)
    session.ingest(words(203))
    session.pin((0, session.tree.length))
    assert session.stats().slots == {0: session.tree.length}
    prompt = model.chat.user_turn_ids("what of the lamp?")
    turn = Turn(model, session.context, session.focus, None)
    logits = [turn.read(prompt, "what of the lamp?")]
    answer = [65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76]
    logits += [turn.step(token) for token in answer]

    ids = [*session.tree.tokens().tolist(), *prompt, *answer]
    x = model.decoder.embed(torch.tensor([ids]))
    plain = model.decoder.logits(model.decoder(x, torch.arange(len(ids))[None]).hidden[0])
    assert relative_error(torch.stack(logits), plain[-len(answer) - 1 :]) < 1e-4
    session.context.drop_pending()


@pytest.mark.parametrize("levels", ["tokens", "gists"])
def test_expand_then_collapse_restores_the_context(memory: Memory, levels: str) -> None:
    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    before, closed = state_of(context), context.expanded
    level = 1 if levels == "tokens" else 2
    node = int(context.entries.index[context.entries.levels == level][1])
    did = context.relayout(opened(context, (level, node)), mode="none")
    assert (did.inserted, did.removed, did.recomputed) == (8, 1, 8 if level == 1 else 0)
    assert not torch.equal(kv_by_rank(context)[0], before[0])
    check_context(context)
    context.relayout(closed, mode="none")
    assert_same(context, before)


def test_collapse_then_expand_is_exact_with_the_archive(memory: Memory) -> None:
    """The block was read in one context and comes back after its surroundings have changed: only kept keys are the
    same ones."""
    session = memory(archive_kv=4)
    session.ingest(words(600))
    context = bring_in(session)
    block, other = collapsed_block(context, 3), collapsed_block(context)
    closed = context.expanded
    context.relayout(opened(context, (1, block)), mode="none")
    with_block = context.expanded
    before = state_of(context)
    context.relayout(closed, mode="none")
    context.relayout(opened(context, (1, other)), mode="none")
    context.relayout(closed, mode="none")
    did = context.relayout(with_block, mode="none")
    assert did.recomputed == 0
    assert_same(context, before)


def test_collapse_then_expand_recomputes_the_same_without_the_archive(memory: Memory) -> None:
    """Same tokens on the same context. A slot's place is free, and sums run in slot order: where the slots are the
    same so are the bits, otherwise only rounding differs."""
    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    closed, opening = context.expanded, opened(context, (1, collapsed_block(context, 3)))
    context.relayout(opening, mode="none")
    before, slots = state_of(context), context.slots
    context.relayout(closed, mode="none")
    did = context.relayout(opening, mode="none")
    assert did.recomputed == 8
    after = state_of(context)
    assert after[2:] == before[2:]
    if torch.equal(context.slots, slots):
        assert torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])
    assert relative_error(after[0], before[0]) < 1e-6
    assert relative_error(after[1], before[1]) < 1e-6

    # On a fresh cache, slots are in order each time, and the bits are the same.
    twins = [context.fork(context.cache.stacked(1)) for _ in range(2)]
    for twin in twins:
        twin.assemble(opening)
    assert_same(twins[0], state_of(twins[1]))


def test_expansion_over_levels_at_once_equals_one_by_one(memory: Memory) -> None:
    session = memory(budget=256)
    session.ingest(words(1100))
    context = bring_in(session)
    top = int(context.entries.index[context.entries.levels == 2][0])
    chain = [(2, top), (1, top * 8 + 3), (1, top * 8 + 5)]
    at_once = context.fork(context.cache.stacked(1))
    did = at_once.relayout(opened(context, *chain), mode="full")
    for node in chain:
        context.relayout(opened(context, node), mode="full")
    assert np.array_equal(context.entries.levels, at_once.entries.levels)
    assert np.array_equal(context.entries.index, at_once.entries.index)
    assert did.inserted == 6 + 16
    for one, other in zip(kv_by_rank(context), kv_by_rank(at_once), strict=True):
        assert relative_error(one, other) < 1e-5


def test_collapse_runs_no_forward_and_expansions_share_one(memory: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    closed = context.expanded
    nodes = [(1, collapsed_block(context, nth)) for nth in (0, 3, 5)]
    with counted_forwards(monkeypatch) as forwards:
        context.relayout(opened(context, *nodes), mode="none")
        assert forwards == [24]
        context.relayout(closed, mode="none")
        assert forwards == [24]
    with counted_forwards(monkeypatch) as forwards:
        context.relayout(opened(context, *nodes), mode="tail")
        assert len(forwards) == 1


def test_an_expanded_block_sees_only_what_precedes_it(memory: Memory, model: LoadedModel) -> None:
    """Its keys are those of a context that ends with it, whatever follows."""
    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    block = collapsed_block(context, 2)
    context.relayout(opened(context, (1, block)), mode="none")
    rank = int(((context.entries.levels == 0) & (context.entries.index == block * 8)).nonzero()[0][0])
    k, v = kv_by_rank(context)
    context.cache.data[:, :, :, :, context.slots[rank + 8 :]] = 1e4  # what follows must not matter
    context.run(np.arange(rank, rank + 8))
    again = kv_by_rank(context)
    assert relative_error(again[0][:, :, : rank + 8], k[:, :, : rank + 8]) < 1e-6
    assert relative_error(again[1][:, :, : rank + 8], v[:, :, : rank + 8]) < 1e-6
    context.relayout(context.expanded, mode="none")


def test_attention_mass_comes_in_timeline_order(memory: Memory) -> None:
    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    for nth in (5, 0, 3):
        context.relayout(opened(context, (1, collapsed_block(context, nth))), mode="full")
    assert not torch.equal(context.slots, torch.arange(context.used))
    twin = context.fork(context.cache.stacked(1))
    twin.assemble(context.expanded)
    assert torch.equal(twin.slots, torch.arange(context.used))
    ids = [65, 66, 67]
    mass, expected = (c.append(ids, return_mass=True).mass for c in (context, twin))
    assert mass is not None
    assert mass.shape == (3, 1, context.used)
    assert relative_error(mass, expected) < 1e-4
    context.drop_pending()


def test_forks_leave_the_context_alone(memory: Memory) -> None:
    session = memory(archive_kv=2)
    session.ingest(words(600))
    context = bring_in(session)
    context.relayout(opened(context, (1, collapsed_block(context, 3))), mode="none")
    before = state_of(context)
    branch = context.fork(context.cache.stacked(1))
    branch.append([65, 66, 67])
    branch.relayout({}, mode="full")
    greedy_logits(context, [65, 66])
    assert_same(context, before)
    assert len(context.archive) == 0
    assert len(branch.archive) > 0


def test_dropped_tokens_leave_no_trace(memory: Memory) -> None:
    session = memory()
    session.ingest(words(300))
    context = bring_in(session)
    before = state_of(context)
    context.append([65, 66, 67])
    context.append([68])
    context.drop_pending()
    assert_same(context, before)
    assert context.length == session.tree.length


def test_too_many_tokens_are_refused_before_anything_changes(memory: Memory) -> None:
    from mc_runtime.errors import BudgetError

    session = memory()
    session.ingest(words(600))
    context = bring_in(session)
    before = state_of(context)
    with pytest.raises(BudgetError, match="slots"):
        context.append([65] * 192)
    everything = {level: np.arange(count) for level, count in enumerate(context.counts) if level}
    with pytest.raises(BudgetError, match="give a larger budget"):
        context.relayout(everything)
    assert_same(context, before)
