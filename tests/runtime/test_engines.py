"""Engines: transformers' own modules over this package's cache against the native decoder, from one forward to a
session; and the part of the interface that an engine without an editable cache implements."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import SMALL, kv_by_rank, refused, relative_error, words
from tiny import tiny_model
from torch import Tensor

from mc_kernels import Edit, SplicePlan, fused_linear, native
from mc_runtime import Session
from mc_runtime.engines import ENGINES, CacheEngine, Engine, NativeEngine, Reading, hf_model, make_engine
from mc_runtime.engines.transformers import TransformersEngine
from mc_runtime.errors import BudgetError, InputError, ModelError
from mc_runtime.model import ConcatStore, Decoder, LoadedModel, RopeConfig, load_model

LLAMA3 = RopeConfig(kind="llama3", theta=500.0, factor=8.0, original_max_positions=32)
YARN = RopeConfig(kind="yarn", theta=500.0, factor=4.0, original_max_positions=32, attention_scaling=1.14)
FACTORS = RopeConfig(kind="factors", factors=(1.0, 1.0, 2.0, 8.0))
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied": {"tied_embeddings": False},
    "llama-bias": {"qkv_bias": True, "out_bias": True},
    "llama3-rope": {"rope": LLAMA3},
    "yarn": {"rope": YARN},
    "gguf-factors": {"rope": FACTORS},
    "mistral": {"architecture": "mistral"},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True},
    "qwen3": {"architecture": "qwen3", "qk_norm": True},
}


def engines(case: str = "llama") -> tuple[NativeEngine, TransformersEngine]:
    """Both over one decoder, whose weights are large enough that attention is peaked."""
    config = replace(tiny_model().config, **CASES[case])
    decoder = Decoder.random(config, std=0.3)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return NativeEngine(decoder), TransformersEngine(decoder)


def inputs(engine: Engine, batch: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, engine.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(2))
    return engine.embed(ids), torch.arange(30, 30 + length).repeat(batch, 1)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_forward_over_a_store_is_the_native_one(case: str) -> None:
    """Hidden states, attention mass, tapped and final streams, over a context with weights and with holes."""
    both = engines(case)
    x, positions = inputs(both[0])
    positions[1, 3] = -1  # padding
    c = both[0].config
    past = torch.randn(2, c.n_layers, 2, c.n_kv_heads, 20, c.head_dim, generator=torch.Generator().manual_seed(3))
    pos, bias = torch.arange(20).repeat(2, 1), torch.linspace(-1, 1, 20).repeat(2, 1)
    pos[0, 4] = -1
    for more in ({"return_mass": True, "hidden_layer": 1}, {"hidden_layer": 3}, {"stop_layer": 2}, {"stop_layer": 0}):
        results, stores = [], []
        for engine in both:
            stores.append(ConcatStore(past[0], past[1], pos, kv_bias=bias))
            results.append(engine.forward(x, positions, stores[-1], **more))
        native, other = results
        real = positions >= 0
        assert relative_error(other.hidden[real], native.hidden[real]) < 1e-5
        assert relative_error(both[1].logits(other.hidden[real]), both[0].logits(native.hidden[real])) < 1e-5
        assert (native.mass is None) == (other.mass is None)
        assert (native.tapped is None) == (other.tapped is None)
        if native.mass is not None and other.mass is not None:
            assert relative_error(other.mass, native.mass) < 1e-5
        if native.tapped is not None and other.tapped is not None:
            assert relative_error(other.tapped[real], native.tapped[real]) < 1e-5
        for stored, expected in zip(stores[1]._k, stores[0]._k, strict=True):
            assert relative_error(stored, expected) < 1e-5, "keys of layers that were not run stay as they were"


def test_weights_are_shared_and_gradients_reach_the_inputs() -> None:
    native, other = engines()
    own = {x.untyped_storage().data_ptr() for x in native.decoder.parameters()}
    assert {x.untyped_storage().data_ptr() for x in other.model.parameters()} <= own
    gradients = []
    for engine in (native, other):
        x, positions = inputs(engine)
        x.requires_grad_()
        engine.logits(engine.forward(x, positions).hidden).square().mean().backward()
        gradients.append(x.grad)
    assert relative_error(gradients[1], gradients[0]) < 1e-4


@pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")
def test_rows_of_transformers_modules_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step's linear maps and its logits are, and many rows' where the library has vectors; what may ask for
    gradients is not."""
    calls: list[int] = []

    def counting(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.numel() // x.shape[-1])
        return fused_linear(x, *args, **kwargs)

    native_engine, other = engines("llama-bias")
    monkeypatch.setattr(hf_model, "fused_linear", counting)
    maps = 7 * other.config.n_layers + 1
    for length, expected in ((1, [1] * maps), (33, [33] * maps * native.vectorised())):
        ids = torch.arange(length)[None]
        with torch.no_grad():
            want, got = (
                e.logits(e.forward(e.embed(ids), ids).hidden) for e in (native_engine, other)
            )  # fmt: skip
        assert calls == expected
        assert relative_error(got, want) < 1e-5
        calls.clear()
    x = native_engine.embed(torch.tensor([[1]]))
    other.forward(x, torch.tensor([[0]]))
    assert not calls


def test_bad_forwards_are_refused_like_the_decoders() -> None:
    for engine in engines():
        x, positions = inputs(engine)
        for message, call in (
            ("x: expected", lambda e=engine, x=x, p=positions: e.forward(x[0], p)),
            ("positions: expected", lambda e=engine, x=x, p=positions: e.forward(x, p.int())),
            ("stop_layer: expected 0 to 3, got 4", lambda e=engine, x=x, p=positions: e.forward(x, p, stop_layer=4)),
        ):
            with refused(InputError, message):
                call()
    config = replace(tiny_model().config, rope=RopeConfig(partial_factor=0.5))
    with refused(ModelError, "rotates whole heads"):
        TransformersEngine(Decoder.random(config))


@pytest.mark.parametrize("name", ENGINES)
@torch.no_grad()
def test_prefill_decode_and_splice(name: str, model: LoadedModel) -> None:
    """Logits of a context read as vectors, of tokens after it, and of tokens after one of its entries has gone."""
    engine, decoder = make_engine(name, model.decoder), model.decoder
    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(4))
    expected = decoder.logits(decoder(decoder.embed(ids), torch.arange(20)[None]).hidden[0])
    reading = engine.prefill(engine.embed(ids[:, :17])[0], room=3)
    got = [reading.logits, *(reading.decode(int(token)) for token in ids[0, 17:])]
    assert relative_error(torch.stack(got), expected[16:]) < 1e-5
    assert reading.logits is got[-1]
    with refused(BudgetError, "20 slots of this reading"):
        reading.decode(1)

    reading = engine.prefill(engine.embed(ids[:, :17])[0], room=3)
    plan = SplicePlan.from_edits(17, [Edit(16, 1, 0)], capacity=20, discipline="slots", slots=torch.arange(17))
    nothing = reading.cache.k[:, 0, :, :0]
    reading.cache.splice(plan, nothing, nothing)
    reading.used -= 1
    without = torch.cat((ids[:, :16], ids[:, 17:18]), dim=1)
    expected = decoder.logits(decoder(decoder.embed(without), torch.arange(17)[None]).hidden[0, -1])
    assert relative_error(reading.decode(int(ids[0, 17])), expected) < 1e-5
    for message, rows, room in (
        ("rows: expected", torch.zeros(0, 32), 1),
        ("room: expected", torch.zeros(1, 32), 4096),
    ):
        with refused(InputError, message):
            engine.prefill(rows, room=room)


class PromptEngine(Engine):
    """What an engine behind a prompt-embedding interface is: it reads whole contexts, and nobody reaches its cache."""

    name = "prompts"

    def prefill(self, rows: Tensor, *, room: int = 256) -> Reading:
        self.check_rows(rows, room)
        return PromptReading(self, rows)


class PromptReading(Reading):
    def __init__(self, engine: Engine, rows: Tensor) -> None:
        self.engine, self.rows = engine, rows
        self.logits = self._run()

    def _run(self) -> Tensor:
        decoder = self.engine.decoder
        output = decoder(self.rows[None], torch.arange(len(self.rows))[None])
        return decoder.logits(output.hidden[0, -1])

    def decode(self, token: int) -> Tensor:
        self.rows = torch.cat((self.rows, self.engine.embed(torch.tensor([[token]]))[0]))
        self.logits = self._run()
        return self.logits


@torch.no_grad()
def test_an_engine_without_an_editable_cache_implements_the_first_part(model: LoadedModel, tmp_path: Path) -> None:
    rows = model.decoder.embed(torch.arange(15)[None])[0]
    logits = []
    for engine in (PromptEngine(model.decoder), NativeEngine(model.decoder)):
        reading = engine.prefill(rows, room=4)
        logits.append(torch.stack([reading.decode(token) for token in (5, 6, 7)]))
    assert relative_error(*logits) < 1e-5
    with refused(InputError, "an engine with an editable cache, got PromptEngine"):
        Session.open(tmp_path / "memory", model, engine=PromptEngine(model.decoder), **SMALL)  # type: ignore[arg-type]


def test_unknown_and_foreign_engines_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    for engine, message in (
        ("llama.cpp", "native, transformers, or an engine with an editable cache, got 'llama.cpp'"),
        (NativeEngine(tiny_model(1).decoder), "over the session's own model"),
    ):
        with refused(InputError, message):
            Session.open(tmp_path / "memory", model, engine=engine, **SMALL)  # type: ignore[arg-type]


def test_a_missing_transformers_is_named(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mc_runtime.engines.transformers", None)
    with refused(ModelError, "engine: "):
        make_engine("transformers", model.decoder)


def talk(session: Session) -> list[str]:
    """Every way in and out: contextual and fast ingest, turns with refocus while decoding, a hint, a batch."""
    session.ingest(words(500), title="a")
    session.ingest(words(200, seed=1), title="b", mode="fast")
    answers = [session.generate("where is the boat?", max_new_tokens=20)]
    session.focus_on((40, 80))
    answers.append(session.generate("and the dog?", max_new_tokens=12))
    return answers + session.generate(["a stone", "the rain at night"], max_new_tokens=9)


@pytest.mark.parametrize("settings", [{"refresh": "full"}, {"refresh": "top", "gist_bias": -0.5}])
def test_a_session_says_and_holds_the_same(memory: Callable[..., Session], settings: dict[str, Any]) -> None:
    sessions = [memory(name, engine=name, gistnet="untrained", **settings) for name in ENGINES]
    assert isinstance(sessions[1].engine, TransformersEngine)
    answers = [talk(session) for session in sessions]
    assert answers[0] == answers[1]
    native, other = (session.context for session in sessions)
    assert native.entries.keys.tolist() == other.entries.keys.tolist()
    assert (native.entries.levels > 0).any()
    for a, b in zip(kv_by_rank(other), kv_by_rank(native), strict=True):
        assert relative_error(a, b) < 1e-3


def test_a_memory_may_change_its_engine(memory: Callable[..., Session]) -> None:
    first = memory("memory", engine="transformers")
    first.ingest(words(300))
    first.generate("where is the boat?", max_new_tokens=8)
    first.close()
    second, third = memory("memory", engine="native"), None
    assert isinstance(second.engine, NativeEngine)
    before = kv_by_rank(second.context)
    second.close()
    third = memory("memory", engine=TransformersEngine(second.model.decoder))
    assert isinstance(third.engine, CacheEngine)
    assert all(torch.equal(a, b) for a, b in zip(kv_by_rank(third.context), before, strict=True))
    assert third.generate("and the dog?", max_new_tokens=4)


@pytest.mark.slow
def test_smollm2_gives_the_same_greedy_answer(tmp_path: Path) -> None:
    model = load_model(dtype=torch.float32, device="cpu")
    text = (
        "The keeper of the lighthouse at Sandvik is called Ingrid Holm. She came to the island in 1911, the year of "
        "the great storm, with a dog and two boxes of books. Her brother Nils brings bread and oil on Tuesdays. "
    )
    answers = []
    for name in ENGINES:
        with Session.open(tmp_path / name, model, engine=name, budget=256, recent_tokens=64) as session:
            session.ingest(text + "The sea was calm and nothing else happened for days. " * 8)
            answers.append(session.generate("Who keeps the lighthouse at Sandvik?", max_new_tokens=16))
            assert (session.context.entries.levels > 0).any()
    assert answers[0] == answers[1]
    assert "Ingrid" in answers[0]
