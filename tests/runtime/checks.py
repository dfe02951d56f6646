"""What the runtime's tests share: settings of a small memory, text, random layouts, and what must always hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mc_runtime import MegaContextError, Session
from mc_runtime.context import WorkingContext
from mc_runtime.focus.allocator import layout_entries
from mc_runtime.focus.forest import check_closed
from mc_runtime.model import Decoder

# Blocks of 8 reach level 3 within 512 tokens.
SMALL: dict[str, Any] = {
    "budget": 192,
    "block_size": 8,
    "recent_tokens": 24,
    "refresh_tail": 16,
    "ingest_chunk": 64,
    "ingest_window": 128,
    "system_prompt": "be brief",
}
# `mc` with arguments, and what is typed into it: exit code, output, errors.
Run = Callable[..., tuple[int, str, str]]
WORDS = ("sea", "wind", "house", "keeper", "lamp", "night", "rain", "bread", "dog", "hill", "boat", "stone")


def words(count: int, seed: int = 0) -> str:
    """Random words: `count` bytes of them, which are tokens of the tiny model."""
    rng = np.random.default_rng(seed)
    text = " ".join(rng.choice(WORDS, count // 3 + 2))[: count - 1]
    return text + "."


def bring_in(session: Session) -> WorkingContext:
    """Lay out what was ingested, as the first turn would."""
    with torch.inference_mode():
        session.focus.make_room(session.context, 0)
    return session.context


def kv_by_rank(context: WorkingContext) -> tuple[Tensor, Tensor]:
    """Keys and values [L, Hkv, N, D] in timeline order."""
    return context.cache.gather(context.slots)


def random_expanded(rng: np.random.Generator, context: WorkingContext, share: float = 0.4) -> dict[int, Any]:
    """A random set of expanded nodes, closed upward, that fits the cache."""
    counts, size = context.counts, context.config.block_size
    chosen: set[tuple[int, int]] = set()
    slots = len(layout_entries(size, counts, {})[0])
    levels = range(1, len(counts))
    nodes = [(level, i) for level in levels for i in range(counts[level]) if rng.random() < share]
    rng.shuffle(nodes)
    for level, index in nodes:
        chain = []
        node = (int(level), int(index))
        while node[0] < len(counts) and node[1] < counts[node[0]]:
            chain.append(node)
            node = (node[0] + 1, node[1] // size)
        new = [n for n in chain if n not in chosen]
        if slots + (size - 1) * len(new) <= context.cache.capacity:
            chosen.update(new)
            slots += (size - 1) * len(new)
    return {level: np.array(sorted(i for n, i in chosen if n == level), np.int64) for level in levels}


def greedy_logits(context: WorkingContext, ids: list[int]) -> Tensor:
    """Logits [T, vocab] of tokens read after the context, on a branch of it."""
    with torch.inference_mode():
        branch = context.fork(context.cache.widened(context.cache.capacity + len(ids)))
        return context.decoder.logits(branch.append(ids).hidden[0])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest value."""
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def check_context(context: WorkingContext) -> None:
    """What holds for every Working Context at every step."""
    entries, size = context.entries, context.config.block_size
    assert context.used <= context.cache.capacity
    assert context.used == len(context.slots)
    ranks = torch.arange(context.used, device=context.slots.device)
    assert torch.equal(context.slots.sort().values, ranks)
    positions = torch.full_like(context.cache.pos[0], -1)
    positions[context.slots] = ranks
    assert torch.equal(context.cache.pos[0], positions)
    if not context.used:
        return
    assert entries.starts[0] == 0
    assert (entries.starts[1:] == entries.starts[:-1] + entries.spans[:-1]).all()
    assert (entries.levels >= 0).all()
    assert entries.stop <= context.length
    seen = context.counts_seen
    check_closed("expanded", size, seen, context.expanded)
    levels, index = layout_entries(size, (entries.stop, *seen[1:]), context.expanded)
    assert np.array_equal(levels, entries.levels)
    assert np.array_equal(index, entries.index)


def check_session(session: Session) -> None:
    """What holds for every session between calls and at every step of decoding."""
    context = session.context
    assert context.cache.capacity == context.config.budget  # a policy's scratch copy may be larger
    check_context(context)
    entries = context.entries
    if context.used and entries.stop == context.length:
        recent = (max(0, context.length - session.config.recent_tokens), context.length)
        head = (0, session.tree.documents()[0].stop)
        for start, stop in (head, recent, *session.focus.pins):
            inside = (entries.starts + entries.spans > start) & (entries.starts < stop)
            assert (entries.levels[inside] == 0).all(), (start, stop)
        assert (entries.levels[entries.starts >= session.tree.count(1) * context.config.block_size] == 0).all()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, session: Session) -> Iterator[None]:
    """Check the session after every change of its context, also in the middle of decoding."""
    with monkeypatch.context() as patch:
        for name in ("append", "extend", "relayout", "commit"):
            plain = getattr(WorkingContext, name)

            def checked(self: WorkingContext, *args: Any, _plain: Callable[..., Any] = plain, **kw: Any) -> Any:
                result = _plain(self, *args, **kw)
                check_session(session) if self is session.context else check_context(self)
                return result

            patch.setattr(WorkingContext, name, checked)
        yield


@contextmanager
def counted_forwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of entries of each forward of the model inside the block."""
    counts: list[int] = []
    plain = Decoder.forward

    def forward(self: Decoder, x: Tensor, *args: Any, **kw: Any) -> Any:
        counts.append(x.shape[1])
        return plain(self, x, *args, **kw)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", forward)
        yield counts


@contextmanager
def refused(kind: type[MegaContextError], message: str) -> Iterator[None]:
    """The block raises `kind`, in one line."""
    with pytest.raises(kind, match=message) as error:
        yield
    assert "\n" not in str(error.value)
