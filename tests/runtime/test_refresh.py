"""What is recomputed after an edit: `full` is a context made from scratch; what the cheaper modes lose is measured."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import bring_in, check_context, greedy_logits, kv_by_rank, random_expanded, relative_error, words

from mc_runtime import Session
from mc_runtime.config import RefreshMode
from mc_runtime.context import WorkingContext
from mc_runtime.refresh import entries_to_recompute

Memory = Callable[..., Session]
MODES: tuple[RefreshMode, ...] = ("none", "tail", "top", "text", "full")
EDITS = (1, 8, 32)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.inference_mode():
        yield


def mixed_memory(memory: Memory, **settings: Any) -> Session:
    """Read text, text that the model never saw, and a turn."""
    session = memory(**settings)
    session.ingest(words(301, seed=1))
    session.ingest(words(333, seed=2), mode="fast")
    session.generate("what of the dog?", max_new_tokens=21)
    session.ingest(words(200, seed=3))
    return session


def from_scratch(context: WorkingContext) -> WorkingContext:
    twin = context.fork(context.cache.stacked(1))
    twin.cache.data.fill_(1e3)  # whatever is reused by mistake shows
    twin.assemble(context.expanded)
    return twin


@pytest.mark.parametrize("kind", ["pooled", "projected", "embedding"])
@pytest.mark.parametrize("seed", range(3))
def test_full_refresh_equals_assembly_from_scratch(memory: Memory, kind: str, seed: int) -> None:
    session = mixed_memory(memory, gist_kind=kind)
    context = bring_in(session)
    rng = np.random.default_rng(seed)
    context.assemble(context.expanded)
    for step in range(8):
        context.relayout(random_expanded(rng, context, share=float(rng.uniform(0.05, 0.8))), mode="full")
        check_context(context)
        if step == 4 and context.used < 180:
            context.append(rng.integers(0, 256, 7).tolist())  # pending tokens take part
    twin = from_scratch(context)
    assert np.array_equal(twin.entries.levels, context.entries.levels)
    for got, expected in zip(kv_by_rank(context), kv_by_rank(twin), strict=True):
        assert relative_error(got, expected) < 1e-5
    probe = rng.integers(0, 256, 9).tolist()
    assert relative_error(greedy_logits(context, probe), greedy_logits(twin, probe)) < 1e-4
    context.drop_pending()


def test_the_cheaper_modes_do_less_and_differ(memory: Memory) -> None:
    """Otherwise the test above could not fail."""
    context = bring_in(mixed_memory(memory))
    rng = np.random.default_rng(0)
    context.assemble(context.expanded)
    layout = random_expanded(rng, context)
    ran, keys = {}, {}
    for mode in MODES:
        branch = context.fork(context.cache.stacked(1))
        ran[mode] = branch.relayout(layout, mode=mode).recomputed
        keys[mode] = kv_by_rank(branch)[0]
    assert ran["none"] < ran["tail"] < ran["full"]
    assert ran["none"] < ran["top"] < ran["full"]
    for mode in ("none", "tail", "top"):
        assert relative_error(keys[mode], keys["full"]) > 1e-3, mode


def runnable(context: WorkingContext) -> np.ndarray:
    """Ranks of what a recomputation can run: tokens, and gists that are run as input embeddings."""
    levels, index = context.entries.levels, context.entries.index
    run = levels == 0
    run[~run] = context.reader.runs(context.tree, levels[~run], index[~run])
    return run.nonzero()[0]


def test_what_each_mode_runs(memory: Memory) -> None:
    session = mixed_memory(memory, refresh_tail=10, refresh_share=0.25)
    context = bring_in(session)
    start = int((context.entries.levels == 0).nonzero()[0][30])
    run = runnable(context)
    behind = run[run >= start]
    given = np.array([start])
    n = context.used

    def ranks(mode: RefreshMode, newest: int = 0, earliest: int | None = start) -> list[int]:
        return entries_to_recompute(context, given, earliest, mode, newest).tolist()

    assert ranks("none") == [start]
    assert ranks("none", newest=3) == [start, n - 3, n - 2, n - 1]
    assert ranks("full") == behind.tolist()
    assert ranks("tail") == [start, *range(n - 10, n)]
    assert ranks("full", earliest=None) == [start]
    top = ranks("top")
    turns = [d for d in session.tree.documents() if d.kind in ("user", "assistant")]
    assert len(turns) == 2
    level, index = context.entries.levels, context.entries.index
    said = [r for r in behind if level[r] == 0 and any(d.start <= index[r] < d.stop for d in turns)]
    assert 0 < len(said) < len(behind)
    assert ranks("text") == [r for r in behind.tolist() if r not in said]
    assert set(top) <= set(behind.tolist())
    assert round(0.25 * len(behind)) <= len(top) <= round(0.25 * len(behind)) + 1


def test_top_with_everything_is_full(memory: Memory) -> None:
    context = bring_in(mixed_memory(memory))
    layout = random_expanded(np.random.default_rng(3), context)
    everything = context.fork(context.cache.stacked(1))
    everything.config = replace(context.config, refresh_share=1.0)
    full = context.fork(context.cache.stacked(1))
    assert everything.relayout(layout, mode="top").recomputed == full.relayout(layout, mode="full").recomputed
    for got, expected in zip(kv_by_rank(everything), kv_by_rank(full), strict=True):
        assert relative_error(got, expected) < 1e-5


def test_top_picks_what_changed_most(memory: Memory) -> None:
    """Entries whose stale keys are far off are found."""
    context = bring_in(mixed_memory(memory, refresh_share=0.1))
    run = runnable(context)
    context.assemble(context.expanded)
    behind = run[run >= run[20]]
    spoilt = np.sort(np.random.default_rng(0).choice(behind, round(0.1 * len(behind)), replace=False))
    context.cache.data[1, 0, 0, :, context.slots[spoilt]] += 50.0
    picked = entries_to_recompute(context, np.zeros(0, np.int64), int(behind[0]), "top", 0)
    assert picked.tolist() == spoilt.tolist()


def one_edit_each(rng: np.random.Generator, context: WorkingContext, count: int) -> list[dict[int, Any]]:
    """Layouts that lead away from the present one by one level-1 node each, opened or closed."""
    head = int(np.argmax(context.entries.levels > 0))
    size = context.config.block_size
    recent = context.length - context.config.recent_tokens
    layouts, now = [], {level: set(nodes.tolist()) for level, nodes in context.expanded.items()}
    parents = (*context.counts, 0)[2]
    free = (context.cache.capacity - context.used) // (size - 1)
    candidates = [
        i
        for i in range(context.tree.count(1))
        if i * size >= head and (i + 1) * size <= recent and (i // size >= parents or i // size in now[2])
    ]
    while len(layouts) < count:
        block = int(rng.choice(candidates))
        if block in now.setdefault(1, set()):
            now[1].discard(block)
            free += 1
        elif free > 0:
            now[1].add(block)
            free -= 1
        else:
            continue
        layouts.append({level: np.array(sorted(nodes), np.int64) for level, nodes in now.items()})
    return layouts


def kl_table(context: WorkingContext, probe: list[int], edits: tuple[int, ...] = EDITS) -> dict[str, list[float]]:
    """KL(full || mode) per token of `probe`, in nats, after so many single edits; `full` against `assemble`."""
    layouts = one_edit_each(np.random.default_rng(7), context, max(edits))
    truth = []
    for count in edits:
        scratch = context.fork(context.cache.stacked(1))
        scratch.assemble(layouts[count - 1])
        truth.append(greedy_logits(scratch, probe).double().log_softmax(-1))
    table: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        branch = context.fork(context.cache.stacked(1))
        for number, layout in enumerate(layouts, start=1):
            # For `full` what came before cannot matter: only the last edit before a measurement is made.
            if mode != "full" or number in edits:
                branch.relayout(layout, mode=mode)
            if number in edits:
                full = truth[edits.index(number)]
                got = greedy_logits(branch, probe).double().log_softmax(-1)
                table[mode].append(float((full.exp() * (full - got)).sum(-1).mean()))
    return table


def show(title: str, table: dict[str, list[float]], edits: tuple[int, ...] = EDITS) -> None:
    print(f"\nKL per token against full refresh, nats: {title}")
    print("edits " + "".join(f"{n:>12}" for n in edits))
    for mode, row in table.items():
        print(f"{mode:6}" + "".join(f"{kl:12.2e}" for kl in row))


def assert_sane(table: dict[str, list[float]], rounding: float) -> None:
    for mode, row in table.items():
        assert all(np.isfinite(row)), mode
        assert min(row) > -rounding, mode
    assert max(map(abs, table["full"])) < rounding
    assert max(table["none"]) > rounding


def test_kl_of_each_mode(memory: Memory, capsys: pytest.CaptureFixture[str]) -> None:
    session = memory(budget=256, recent_tokens=32)
    session.ingest(words(1100))
    context = bring_in(session)
    context.assemble(context.expanded)
    table = kl_table(context, list(words(40, seed=9).encode()))
    with capsys.disabled():
        show("tiny random model, blocks of 8, budget 256", table)
    assert_sane(table, rounding=1e-6)


@pytest.mark.slow
def test_kl_of_each_mode_with_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mc_runtime.errors import ModelError
    from mc_runtime.model import load_model

    try:
        model = load_model(dtype=torch.float32)
    except ModelError as error:
        pytest.skip(str(error))
    text = "\n\n".join(inspect.getdoc(thing) or "" for thing in (json, shutil.copytree, inspect.signature, Path, print))
    text += "\n\n".join(inspect.getdoc(getattr(str, name)) or "" for name in sorted(dir(str)) if name[0] != "_")
    ids = model.tokenizer.encode(text)
    with Session.open(tmp_path / "memory", model, gistnet="untrained", budget=384, recent_tokens=64) as session:
        session.ingest(ids[:1000])
        context = bring_in(session)
        context.assemble(context.expanded)
        table = kl_table(context, ids[1000:1032])
    with capsys.disabled():
        show("SmolLM2-135M, 1,000 tokens of Python's documentation, untrained gists, budget 384", table)
    assert_sane(table, rounding=1e-4)
