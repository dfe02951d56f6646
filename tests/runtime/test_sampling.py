"""How tokens are chosen and where text is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checks import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from mc_runtime import SamplingParams, Session
from mc_runtime.errors import InputError, ModelError
from mc_runtime.model import Decoder
from mc_runtime.sampling import ROW, Sampler, StopStrings, first_to_reach, keep_best

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, 2.0, -3.0])
DRAWS = 4000


def frequencies(**params: Any) -> np.ndarray:
    sampler = Sampler(SamplingParams(seed=0, **params))
    return np.bincount([sampler(LOGITS) for _ in range(DRAWS)], minlength=len(LOGITS)) / DRAWS


def softmax(temperature: float = 1.0) -> np.ndarray:
    return (LOGITS.double() / temperature).softmax(0).numpy()


def assert_drawn_from(got: np.ndarray, expected: np.ndarray) -> None:
    assert ((got > 0) <= (expected > 0)).all()
    assert np.abs(got - expected).max() < 4 * np.sqrt(0.25 / DRAWS)


def kept(expected: np.ndarray, tokens: list[int]) -> np.ndarray:
    mask = np.isin(np.arange(len(expected)), tokens)
    return np.where(mask, expected, 0) / expected[mask].sum()


def test_greedy_takes_the_first_of_the_best() -> None:
    assert Sampler(SamplingParams())(LOGITS) == 1
    assert Sampler(SamplingParams(top_k=3, top_p=0.2))(LOGITS) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [-40.0, -8.0, 0.0, 8.0])
def test_greedy_whatever_the_sign(dtype: torch.dtype, shift: float) -> None:
    generator = torch.Generator().manual_seed(3)
    for size in (1, 7, 1000):
        logits = (torch.randn(size, generator=generator) * 3 + shift).to(dtype)
        assert Sampler(SamplingParams())(logits) == int(logits.double().argmax())
    for first in ([0.0, -0.0], [-0.0, 0.0], [-float("inf"), -0.0, 0.0], [2.0, float("inf"), float("inf")]):
        logits = torch.tensor(first, dtype=dtype)
        assert Sampler(SamplingParams())(logits) == int(logits.double().argmax())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    assert_drawn_from(frequencies(temperature=temperature), softmax(temperature))


@pytest.mark.parametrize(("top_k", "tokens"), [(1, [1]), (2, [1, 4]), (3, [1, 3, 4]), (99, [0, 1, 2, 3, 4, 5])])
def test_top_k(top_k: int, tokens: list[int]) -> None:
    assert_drawn_from(frequencies(temperature=1.0, top_k=top_k), kept(softmax(), tokens))


@pytest.mark.parametrize(("top_p", "tokens"), [(0.01, [1]), (0.37, [1]), (0.5, [1, 4]), (0.85, [1, 3, 4])])
def test_top_p_keeps_the_token_that_crosses(top_p: float, tokens: list[int]) -> None:
    best = np.sort(softmax())[::-1].cumsum()
    assert best[len(tokens) - 1] >= top_p > (best[len(tokens) - 2] if len(tokens) > 1 else 0)
    assert_drawn_from(frequencies(temperature=1.0, top_p=top_p), kept(softmax(), tokens))


def test_top_k_comes_before_top_p() -> None:
    """Of the two best, each has half of what is left: 0.45 is reached by one."""
    assert_drawn_from(frequencies(temperature=1.0, top_k=2, top_p=0.45), kept(softmax(), [1]))


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    """Logits over it are beyond what fp32 holds."""
    assert frequencies(temperature=temperature)[[1, 4]].sum() == 1
    assert frequencies(temperature=temperature, top_k=3, top_p=0.9)[[1, 4]].sum() == 1


@pytest.mark.parametrize("top_p", [1e-9, 1e-50, 5e-324])
def test_a_top_p_near_zero_keeps_the_best(top_p: float) -> None:
    assert frequencies(temperature=1.0, top_p=top_p)[1] == 1


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("bad", [[float("nan"), 1.0], [float("inf"), 1.0], [-float("inf")] * 2], ids=str)
def test_nothing_is_drawn_from_logits_that_are_none(bad: list[float], params: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"^logits: expected"):
        Sampler(SamplingParams(temperature=1.0, **params))(torch.tensor(bad))


def test_logits_are_left_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(3 * ROW + 5, requires_grad=True).to(dtype)
        before = logits.clone()
        for params in ({}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8}):
            Sampler(SamplingParams(seed=1, **params), vocab_size=ROW + 1)(logits)  # type: ignore[arg-type]
        assert torch.equal(logits, before)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3 * ROW),
    st.integers(0, 3 * ROW),
    st.floats(0, 1, exclude_min=True),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_what_is_kept(n: int, top_k: int, top_p: float, seed: int, coarse: bool) -> None:
    """As by sorting all of them; where many are equal the lowest ids stay."""
    weights = np.random.default_rng(seed).random(n).astype(np.float32) ** 8
    if coarse:
        weights = np.round(weights, 1)
    weights[0] += 1
    order = np.argsort(-weights, kind="stable")[: top_k or n]
    before = weights[order].cumsum(dtype=np.float64) - weights[order]
    reached = top_p * weights[order].sum(dtype=np.float64)
    if top_p < 1:
        near = np.abs(before - reached) < 1e-9 * reached  # rounding may decide
        if near.any():
            return
        order = order[before < reached]
    expected = np.zeros_like(weights)
    expected[order] = weights[order]
    keep_best(weights, top_k, top_p)
    np.testing.assert_array_equal(weights, expected)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3 * ROW), st.floats(0, 1, exclude_min=True), st.integers(0, 2**32 - 1))
def test_a_share_is_reached_where_the_sums_say(n: int, share: float, seed: int) -> None:
    """And never at one that has no weight, however small or large the share."""
    rng = np.random.default_rng(seed)
    weights = rng.random(n).astype(np.float32) * (rng.random(n) < 0.3)
    weights[rng.integers(n)] = 1
    at = first_to_reach(weights, share)
    sums = weights.cumsum(dtype=np.float64)
    assert weights[at] > 0
    assert sums[at] >= share * sums[-1] * (1 - 1e-12)
    assert sums[at] - weights[at] <= share * sums[-1] * (1 + 1e-12)


def test_draws_from_a_vocabulary() -> None:
    """More tokens than a row of sums: chi-square of 64 bins, each of every 64th token."""
    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 2
    sampler, bins = Sampler(SamplingParams(temperature=1.0, seed=0)), np.arange(len(logits)) % 64
    expected = np.bincount(bins, logits.double().softmax(0).numpy()) * DRAWS
    got = np.bincount([bins[sampler(logits)] for _ in range(DRAWS)], minlength=64)
    assert ((got - expected) ** 2 / expected).sum() < 115  # 63 degrees of freedom: once in ten thousand


def test_rows_beyond_the_vocabulary_are_never_chosen(tmp_path: Path) -> None:
    """Models pad their vocabulary (Qwen2 by some hundred rows); a memory cannot keep what is no token."""
    small = tiny_model()
    config = replace(small.config, vocab_size=small.config.vocab_size + 300)
    padded = replace(small, config=config, decoder=Decoder.random(config, seed=0, std=0.3))
    with Session.open(tmp_path, padded, **SMALL) as session:
        for seed in range(4):
            session.generate("and the sea?", max_new_tokens=20, temperature=2.0, seed=seed)
        session.generate("and the sea?", max_new_tokens=20)
        session.generate(["and the sea?"], max_new_tokens=20, temperature=2.0, seed=1)
        turns = session.stats().turns
    assert [turn.new_tokens for turn in turns if turn.finish_reason == "length"]
    assert all(turn.finish_reason in ("length", "stop") for turn in turns)


def test_seeds() -> None:
    def draw(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=3.0, seed=seed))
        return [sampler(LOGITS) for _ in range(40)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(None) != draw(None)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0}, {"max_new_tokens": 1.5}, {"temperature": -1}, {"temperature": float("nan")},
        {"temperature": "hot"}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": None}, {"top_k": -1}, {"top_k": 2.0},
        {"max_new_tokens": True}, {"seed": True},
        {"seed": "x"}, {"seed": 2**70}, {"seed": -1}, {"stop": "text"}, {"stop": ("",)}, {"stop": (3,)}, {"stop": None},
    ],
    ids=str,
)  # fmt: skip
def test_unusable_parameters_are_named(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^{next(iter(bad))}: expected") as error:
        SamplingParams(**bad)
    assert "\n" not in str(error.value)


def cut(text: str, stop: tuple[str, ...]) -> str:
    """Up to the stop string that is complete first; of those that end together, the longest."""
    for end in range(len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("ab.", max_size=4), max_size=10), st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_as_if_the_text_were_whole(pieces: list[str], stop: list[str]) -> None:
    """Whatever the pieces, what is shown so far is right and no more is held back than may begin a stop string."""
    stops, shown, so_far = StopStrings(tuple(stop)), "", ""
    for piece in pieces:
        shown += stops.push(piece)
        so_far += piece
        whole = cut(so_far, tuple(stop))
        assert whole.startswith(shown)
        assert stops.hit == (whole != so_far)
        held = whole[len(shown) :]
        assert not held or any(s.startswith(held) for s in stop)
    shown += stops.flush()
    assert shown == cut("".join(pieces), tuple(stop))


def test_a_long_stop_string_costs_what_the_text_does() -> None:
    """One of a megabyte is compared with no more than what is there."""

    class Counted(str):
        taken = 0

        def __getitem__(self, index: Any) -> str:
            Counted.taken += 1
            return str(self)[index]

    stops = StopStrings((Counted("a" * 5000),))
    assert stops.push("a" * 20 + "b" * 20) == "a" * 20 + "b" * 20
    assert Counted.taken <= 50


def test_a_session_stops_at_a_stop_string(memory: Callable[..., Session]) -> None:
    session = memory("one")
    full = session.generate("and the sea?", max_new_tokens=60)
    for i, stop in enumerate((full[20], full[20:23], "never")):
        other = memory(f"other {i}")
        pieces = list(other.generate("and the sea?", stream=True, max_new_tokens=60, stop=[stop]))
        assert "".join(pieces) == cut(full, (stop,))
        assert (other.stats().turns[-1].new_tokens < 60) == (stop in full)
        answer = other.tree.documents()[-1]
        kept_ids = other.tree.tokens(answer.start, answer.stop).tolist()
        assert other.model.tokenizer.decode(kept_ids).startswith(cut(full, (stop,)))


def test_max_new_tokens_is_exact(memory: Callable[..., Session]) -> None:
    session = memory()
    for count in (1, 7, 8, 9):
        session.generate("and the sea?", max_new_tokens=count)
        assert session.stats().turns[-1].new_tokens == count
