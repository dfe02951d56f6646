"""Named ranges for profilers, and what a session measures of itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from checks import words

from mc_runtime import Session, profiling
from mc_runtime.stats import SessionStats, TurnStats


def test_without_the_package_a_range_only_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "nvtx", None)
    with profiling.timed("sleep") as timer:
        assert timer.seconds == 0
        time.sleep(0.01)
    assert 0.01 <= timer.seconds < 1


@pytest.mark.parametrize("fails", [False, True])
def test_with_the_package_ranges_are_opened_and_closed(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    calls: list[tuple[object, ...]] = []

    def start_range(*, message: str, domain: str) -> int:
        calls.append(("start", message, domain))
        return 7

    monkeypatch.setattr(
        profiling,
        "nvtx",
        SimpleNamespace(start_range=start_range, end_range=lambda handle: calls.append(("end", handle))),
    )
    try:
        with profiling.timed("splice") as timer:
            assert calls == [("start", "splice", "megacontext")]
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert calls[1:] == [("end", 7)]
    assert timer.seconds > 0


def test_the_installed_package_is_called_as_it_wants() -> None:
    pytest.importorskip("nvtx")
    with profiling.timed("outer"), profiling.timed("inner"):
        pass


def test_a_session_names_its_parts(memory: Callable[..., Session], monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    open_ranges: list[str] = []

    def start_range(*, message: str, domain: str) -> str:
        names.append(message)
        open_ranges.append(message)
        return message

    monkeypatch.setattr(profiling, "nvtx", SimpleNamespace(start_range=start_range, end_range=open_ranges.remove))
    session = memory()
    session.ingest(words(600))
    session.generate("what of the dog?", max_new_tokens=20)
    parts = {"ingest", "gist", "prefill", "refocus", "score", "allocate", "splice", "recompute", "decode"}
    assert parts <= set(names)
    assert names.count("decode") == 20
    assert open_ranges == []


def test_stats(memory: Callable[..., Session]) -> None:
    session = memory()
    document = session.ingest(words(600))
    session.generate("what of the dog?", max_new_tokens=20)
    session.generate("and the sea?", max_new_tokens=3)
    stats = session.stats()
    assert (stats.tokens, stats.budget, stats.documents) == (session.tree.length, 192, 6)
    assert stats.nodes == {level: session.tree.length // 8**level for level in (1, 2, 3)}
    assert stats.used == sum(stats.slots.values()) == session.context.used <= stats.budget
    first, second = stats.turns
    assert (first.prompt, first.new_tokens, second.new_tokens) == ("what of the dog?", 20, 3)
    assert len(first.decode) == 20
    assert len(first.refocus) == 3  # the prompt's, and one every 8 tokens
    assert first.edits == first.expanded + first.collapsed > 0
    assert first.recomputed > 0
    assert 0 < first.seconds_per_token < first.time_to_first_token < 60
    assert first.seconds_per_refocus > 0
    assert math.isnan(TurnStats().seconds_per_token)
    assert math.isnan(TurnStats().seconds_per_refocus)
    assert SessionStats(0, 1, {}, {}, 0, []).used == 0
    assert document.stop < stats.tokens


def test_ranges_are_collected_by_what_they_stand_in() -> None:
    with profiling.collect_ranges() as outer:
        with profiling.timed("turn"):
            with profiling.collect_ranges() as inner, profiling.timed("score"):
                pass
            with profiling.timed("score"):
                pass
        with pytest.raises(KeyError), profiling.timed("splice"), profiling.timed("moves"):
            raise KeyError
        with profiling.timed("score") as timer:
            pass
    with profiling.timed("late"):
        pass
    assert {name: len(seconds) for name, seconds in outer.items()} == {
        "turn/score": 2, "turn": 1, "splice/moves": 1, "splice": 1, "score": 1,
    }  # fmt: skip
    assert list(inner) == ["turn/score"]
    assert outer["score"] == [timer.seconds]
    assert outer["turn"][0] >= sum(outer["turn/score"])


def test_a_running_torch_profiler_sees_the_ranges(memory: Callable[..., Session]) -> None:
    session = memory()
    session.ingest(words(600))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        session.generate("what of the dog?", max_new_tokens=10)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["decode"] == 10
    assert {"prefill", "refocus", "index", "score", "allocate", "splice", "recompute"} <= set(counts)
