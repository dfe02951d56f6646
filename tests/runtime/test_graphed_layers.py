"""Decode steps and chunks of text replayed as a CUDA graph do what the layers do one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from tiny import tiny_model
from torch import Tensor, nn

from mc_runtime.engines import NativeEngine
from mc_runtime.ingest import _Chunks
from mc_runtime.kv_cache import KVCache
from mc_runtime.model.decoder import Decoder
from mc_runtime.model.graphed_layers import MOST_GRAPHS, GraphedLayers, Step

PROMPT, STEPS = 20, 6


class Repeated:
    """As a graph, but it runs the step again."""

    def __init__(self, step: Callable[[], Step], results: Step) -> None:
        self.step, self.results = step, results

    def replay(self) -> None:
        for kept, new in zip(self.results, self.step(), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)


def repeat(step: Callable[[], Step], _: torch.device) -> tuple[Repeated, Step]:
    results = step()
    for x in results:
        if x is not None:
            x.fill_(float("nan"))
    return Repeated(step, results), results


@pytest.fixture(params=[pytest.param("cpu", id="repeated"), pytest.param("cuda", marks=pytest.mark.gpu, id="gpu")])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu":
        monkeypatch.setattr("mc_runtime.model.graphed_layers.capture", repeat)
        monkeypatch.setattr(
            "mc_runtime.model.decoder.graphs", lambda x, store: x.shape[1] == 1 or getattr(store, "repeats", False)
        )
    return tiny_model(device=request.param).decoder


def steps(decoder: Decoder, batch: int, weighted: bool, want_mass: bool) -> tuple[list[Tensor], list[Tensor], KVCache]:
    """Hidden states and masses of a few steps behind a prompt, over a cache that is larger than what is in it."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(batch, PROMPT + STEPS, decoder.config.embed_dim, generator=generator).to(
        decoder.device, decoder.dtype
    )
    cache = KVCache.allocate(
        decoder.config, 64, batch=batch, dtype=decoder.dtype, device=decoder.device, weighted=weighted
    )
    if cache.bias is not None:
        cache.bias[:, :5] = -1.0
    hidden, masses = [], []
    with torch.inference_mode():
        for first, count in [(0, PROMPT), *((PROMPT + i, 1) for i in range(STEPS))]:
            positions = torch.arange(first, first + count, device=decoder.device).expand(batch, -1)
            cache.pos[:, first : first + count] = positions
            writer = cache.writer(positions.contiguous(), first + count)
            out = decoder(rows[:, first : first + count], positions, writer, return_mass=want_mass)
            hidden.append(out.hidden)
            masses += [] if out.mass is None else [out.mass]
    return hidden, masses, cache


def usual(decoder: Decoder) -> Decoder:
    """The same, whose steps are never recorded."""
    other = copy.deepcopy(decoder)
    other._graphed_layers.run = lambda *_: None  # type: ignore[method-assign]
    return other


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got.float() - expected.float()).norm() <= 1e-4 * expected.float().norm())


@pytest.mark.parametrize(("batch", "weighted", "want_mass"), [(1, False, False), (1, True, True), (3, True, True)])
def test_steps_are_those_of_the_layers(decoder: Decoder, batch: int, weighted: bool, want_mass: bool) -> None:
    hidden, masses, cache = steps(decoder, batch, weighted, want_mass)
    expected, expected_masses, expected_cache = steps(usual(decoder), batch, weighted, want_mass)
    assert len(decoder._graphed_layers) == 1
    for got, want in zip([*hidden, *masses], [*expected, *expected_masses], strict=True):
        assert got.shape == want.shape
        assert close(got, want)
    assert close(cache.data, expected_cache.data)
    assert len(hidden) == STEPS + 1
    assert len({x.data_ptr() for x in hidden}) == STEPS + 1  # a later step does not write into what was returned


@pytest.mark.parametrize("tap", [None, 0, 1, 2])
def test_chunks_of_a_text_are_those_of_the_layers(decoder: Decoder, tap: int | None) -> None:
    """Where the store says that they repeat, with a tapped layer; others are run one by one."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(1, 70, decoder.config.embed_dim, generator=generator).to(decoder.device, decoder.dtype)
    results = []
    for one in (decoder, usual(decoder)):
        cache = KVCache.allocate(one.config, 96, dtype=one.dtype, device=one.device)
        outputs = []
        with torch.inference_mode():
            for first in range(0, 70, 16):
                count = min(16, 70 - first)
                positions = torch.arange(first, first + count, device=one.device)[None]
                cache.pos[:, first : first + count] = positions
                writer = cache.writer(positions, first + count, repeats=count == 16)
                outputs.append(one(text[:, first : first + count], positions, writer, hidden_layer=tap))
        results.append((outputs, cache))
    (got, got_cache), (want, want_cache) = results
    assert len(decoder._graphed_layers) == 1
    for a, b in zip(got, want, strict=True):
        assert close(a.hidden, b.hidden)
        assert (a.tapped is None) == (b.tapped is None) == (tap is None)
        if a.tapped is not None and b.tapped is not None:
            assert close(a.tapped, b.tapped)
    assert len({a.hidden.data_ptr() for a in got}) == len(got)
    assert close(got_cache.data, want_cache.data)


def test_ingest_reads_its_whole_chunks_by_graphs(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding window, so that slots are dropped and numbered anew between the chunks."""
    replays: list[int] = []
    run = GraphedLayers.run
    monkeypatch.setattr(
        GraphedLayers, "run", lambda self, *a: (lambda r: replays.append(r is not None) or r)(run(self, *a))
    )
    ids = torch.randint(0, decoder.config.vocab_size, (150,), generator=torch.Generator().manual_seed(3)).numpy()
    results = []
    for one in (decoder, usual(decoder)):
        chunks = _Chunks(NativeEngine(one), sink=8, window=16, chunk=32)
        with torch.inference_mode():
            results.append([tuple(x.clone() for x in chunks.run(ids[i : i + 32])) for i in range(0, 150, 32)])
    assert replays[:5] == [False, True, True, True]
    for got, want in zip(*results, strict=True):
        assert all(close(a, b) for a, b in zip(got, want, strict=True))


def test_other_weights_are_recorded_anew(decoder: Decoder) -> None:
    before = steps(decoder, 1, False, False)[0]
    layer = decoder.layers[0]
    layer.ffn.down.weight = nn.Parameter(layer.ffn.down.weight * 2, requires_grad=False)
    assert not close(steps(decoder, 1, False, False)[0][-1], before[-1])
    layer.attention.qkv.weight.data = layer.attention.qkv.weight.data * 2  # as `Module.to` does
    got, expected = steps(decoder, 1, False, False)[0], steps(usual(decoder), 1, False, False)[0]
    assert close(got[-1], expected[-1])


def test_hooks_are_called(decoder: Decoder) -> None:
    seen: list[int] = []
    handle = decoder.layers[0].ffn.register_forward_hook(lambda *_: seen.append(1))
    steps(decoder, 1, False, False)
    assert len(seen) == STEPS + 1
    handle.remove()
    handle = decoder.norm.register_forward_hook(lambda *_: seen.append(1))
    steps(decoder, 1, False, False)
    assert len(seen) == 2 * (STEPS + 1)
    handle.remove()


def test_few_graphs_are_kept(decoder: Decoder) -> None:
    caches = [steps(decoder, 1, False, False)[2] for _ in range(MOST_GRAPHS + 3)]
    assert len(caches) == MOST_GRAPHS + 3
    assert 0 < len(decoder._graphed_layers) <= MOST_GRAPHS


def test_a_copy_starts_with_none() -> None:
    assert len(copy.deepcopy(GraphedLayers())) == 0
