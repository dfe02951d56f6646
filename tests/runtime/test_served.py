"""A memory over an engine that takes prompt embeddings: it says what a `Session` over the native engine says, shows
the engine the same vectors, and keeps the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import SMALL, refused, relative_error, words
from prompt_engine import DecoderPrompts
from tiny import tiny_model

from mc_runtime import Session
from mc_runtime.engines import NativeEngine
from mc_runtime.errors import BudgetError, InputError
from mc_runtime.model import Decoder, LoadedModel
from mc_runtime.sampling import SamplingParams
from mc_runtime.served import DEFAULTS, ServedSession

EXACT = {**DEFAULTS, "refresh": "full", "refresh_decode": "full", "gistnet": "untrained"}


@pytest.fixture
def served(tmp_path: Path, model: LoadedModel) -> Iterator[Callable[..., ServedSession]]:
    opened: list[ServedSession] = []

    def open_served(name: str = "served", **settings: Any) -> ServedSession:
        engine = DecoderPrompts(model.decoder)
        session = ServedSession.open(tmp_path / name, engine, model, gistnet="untrained", **SMALL | settings)
        opened.append(session)
        return session

    yield open_served
    for session in opened:
        session.close()


def fill(session: Session | ServedSession) -> None:
    session.ingest(words(500), title="a")
    session.ingest(words(300, seed=1), title="b")


def test_it_says_and_keeps_what_the_native_engine_does(
    memory: Callable[..., Session], served: Callable[..., ServedSession]
) -> None:
    """Three turns, with refocus between them and every 8 tokens, then a batch; greedy and drawn from few."""
    own, other = memory("own", **EXACT), served()
    for session in (own, other):
        fill(session)
    for prompt, count in (("where is the boat?", 20), ("and the dog?", 8), ("rain", 3)):
        assert other.generate(prompt, max_new_tokens=count) == own.generate(prompt, max_new_tokens=count)
        assert other.context.entries.keys.tolist() == own.context.entries.keys.tolist()
        assert (other.context.entries.levels > 0).any()
        assert not other.context.pending
    prompts = ["a stone", "the rain at night", "keeper"]
    assert other.generate(prompts, max_new_tokens=19) == own.generate(prompts, max_new_tokens=19)
    assert other.search("boat", 3, kinds=["document"]) == own.search("boat", 3, kinds=["document"]) != []
    assert other.tree.tokens().tolist() == own.tree.tokens().tolist()
    for level in range(1, own.tree.n_levels + 1):
        assert relative_error(other.tree.summaries(level), own.tree.summaries(level)) < 1e-6
    assert [d.title for d in other.tree.documents()] == [d.title for d in own.tree.documents()]


def test_answers_end_where_the_budget_is_full(
    memory: Callable[..., Session], served: Callable[..., ServedSession]
) -> None:
    """Where those of a session do, and none is lost."""
    settings = {"budget": 128, "recent_tokens": 8}
    own, other = memory("own", **EXACT | settings), served(**settings)
    for session in (own, other):
        fill(session)
    prompts, sampling = ["x", "the sea?"], {"max_new_tokens": 200, "stop": ["never said"]}
    answers = other.generate(prompts, **sampling)
    assert answers == own.generate(prompts, **sampling)
    assert all(0 < turn.new_tokens < 200 for turn in other.turns)
    other.generate("go on", max_new_tokens=3)


def test_an_answer_ends_at_what_is_no_token(tmp_path: Path) -> None:
    """A row that pads the model's vocabulary: what was said before it is kept."""
    small = tiny_model()
    config = replace(small.config, vocab_size=small.config.vocab_size + 300)
    padded = replace(small, config=config, decoder=Decoder.random(config, seed=0, std=0.3))
    engine = DecoderPrompts(padded.decoder)
    with ServedSession.open(tmp_path / "m", engine, padded, gistnet="untrained", **SMALL) as session:
        for seed in range(6):
            session.generate("and the sea?", max_new_tokens=20, temperature=2.0, seed=seed)
        session.generate(["and the sea?", "rain"], max_new_tokens=20, temperature=2.0, seed=1)
        assert any(0 < turn.new_tokens < 20 for turn in session.turns)
        assert [d.kind for d in session.tree.documents()].count("user") == 6


def test_the_engine_is_shown_tokens_and_gists_of_the_layout(served: Callable[..., ServedSession]) -> None:
    session = served()
    fill(session)
    session.generate("where is the boat?", max_new_tokens=20)
    seen = session.engine.seen
    assert len(seen) == 3  # 8 + 8 + 4 tokens
    assert all(len(rows) <= session.config.budget for rows in seen)
    entries, rows = session.context.entries, session.context.rows()
    for rank in (0, len(entries) // 2, int((entries.levels > 0).nonzero()[0][0])):
        level, index = int(entries.levels[rank]), int(entries.index[rank])
        token = session.tree.tokens()[index] if level == 0 else 0
        expected = (
            session.tree.summaries(level)[index]
            if level
            else session.model.decoder.embed(torch.tensor([[int(token)]]))[0, 0]
        )
        assert torch.equal(rows[rank], expected.to(rows))


def test_a_stop_string_ends_the_turn_and_what_is_kept(
    memory: Callable[..., Session], served: Callable[..., ServedSession]
) -> None:
    own, other = memory("own", **EXACT), served()
    for session in (own, other):
        fill(session)
    whole = served("whole")
    fill(whole)
    stop = whole.generate("where?", max_new_tokens=30)[9:11]
    pieces = list(other.stream("where?", max_new_tokens=30, stop=[stop]))
    assert "".join(pieces) == own.generate("where?", max_new_tokens=30, stop=[stop])
    assert other.tree.tokens().tolist() == own.tree.tokens().tolist()


def test_seeds_repeat_and_requests_do_not_draw_alike(served: Callable[..., ServedSession]) -> None:
    def drawn(name: str, seed: int) -> str:
        session = served(name)
        fill(session)
        answer: str = session.generate("where?", max_new_tokens=24, temperature=5.0, seed=seed)
        return answer

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


def test_it_reopens_with_its_layout_and_as_a_session(
    memory: Callable[..., Session], served: Callable[..., ServedSession]
) -> None:
    first = served("memory")
    fill(first)
    first.generate("where is the boat?", max_new_tokens=9)
    keys, length = first.context.entries.keys.tolist(), first.tree.length
    first.close()
    again = served("memory")
    assert again.context.entries.keys.tolist() == keys
    again.close()
    small = served("memory", budget=80, recent_tokens=8)
    assert small.context.used == 0
    assert small.generate("and the dog?", max_new_tokens=3)
    assert small.context.used <= 80
    small.close()
    own = memory("memory", **EXACT)
    assert own.tree.length > length
    assert own.generate("and the boat?", max_new_tokens=3)


def test_a_failing_engine_leaves_the_memory_whole(served: Callable[..., ServedSession]) -> None:
    session = served()
    fill(session)
    before = session.tree.length

    def fail(*_: Any) -> None:
        raise ConnectionError("gone")

    session.engine._complete = fail
    with pytest.raises(ConnectionError):
        session.generate("where?", max_new_tokens=9)
    del session.engine._complete
    assert not session.context.pending
    assert session.tree.length > before, "what the user said is kept"
    assert session.generate("where?", max_new_tokens=9)


def test_what_such_an_engine_cannot_do_is_refused(served: Callable[..., ServedSession], tmp_path: Path) -> None:
    for message, settings in (
        ('gist_kind: expected "embedding"', {"gist_kind": "pooled"}),
        ('ingest: expected "fast"', {"ingest": "contextual"}),
        ("gist_bias: expected 0", {"gist_bias": -1.0}),
        ("policy: blend needs attention mass", {"policy": "blend"}),
    ):
        with refused(InputError, message):
            served("refused", **settings)
    model = tiny_model()
    with refused(InputError, "engine: expected one over the decoder of `model`"):
        ServedSession.open(tmp_path / "x", DecoderPrompts(tiny_model(1).decoder), model, gistnet="untrained", **SMALL)
    session = served()
    for message, call in (
        ("prompt: expected text", lambda: session.generate(" ")),
        ("prompt: expected text", lambda: session.stream("")),
        ("sampling: heat", lambda: session.generate("a", heat=1)),
    ):
        with refused(InputError, message):
            call()
    stream = session.stream("where?", max_new_tokens=20)
    next(stream)
    with refused(InputError, "still streaming"):
        session.generate("where?")
    stream.close()
    session.close()
    with refused(InputError, "it is closed"):
        session.generate("where?")


@torch.no_grad()
def test_completions_of_every_engine(model: LoadedModel) -> None:
    """`complete` is the same by logits (native) and by whole contexts, and ends where it is told to."""
    generator = torch.Generator().manual_seed(3)
    contexts = [model.decoder.embed(torch.randint(0, 256, (1, n), generator=generator))[0] for n in (5, 17)]
    own, other = NativeEngine(model.decoder), DecoderPrompts(model.decoder)
    params = SamplingParams()
    tokens = own.complete(contexts, params, count=6)
    assert tokens == other.complete(contexts, params, count=6)
    assert [len(t) for t in tokens] == [6, 6]
    for rows, expected in zip(contexts, tokens, strict=True):
        reading = other.prefill(rows, room=5)
        for token in expected[:-1]:
            assert int(reading.logits.argmax()) == token
            reading.decode(token)
        assert int(reading.logits.argmax()) == expected[-1]
        with refused(BudgetError, "room"):
            reading.decode(0)
    ended = own.complete(contexts, params, count=6, eos_ids=[tokens[0][3]])
    assert ended[0] == tokens[0][: tokens[0].index(tokens[0][3])]
    assert other.complete([], params, count=6) == []
    with refused(InputError, "rows: expected"):
        other.complete([contexts[0][:0]], params, count=1)
