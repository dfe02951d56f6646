"""The decoder over random weights: caching, padding, gradients, attention mass."""

import pytest
import torch

from mc_kernels import native
from mc_kernels.testing import assert_within_error_rule
from mc_runtime.errors import InputError
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import ConcatStore, Decoder, ModelConfig, RopeConfig
from mc_runtime.model import decoder as decoder_module
from mc_runtime.model import layers as layers_module

TINY = ModelConfig(
    architecture="qwen3",
    vocab_size=50,
    embed_dim=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    ffn_dim=40,
    norm_eps=1e-5,
    rope=RopeConfig(),
    max_positions=64,
    qkv_bias=True,
    qk_norm=True,
)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder.random(TINY, std=0.3, dtype=torch.float64)


def entries(decoder: Decoder, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    ids = torch.randint(0, TINY.vocab_size, (batch, length), generator=generator)
    return decoder.embed(ids), torch.arange(length).expand(batch, length)


@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 4], [9]])
def test_cached_steps_equal_one_shot(decoder: Decoder, chunks: list[int]) -> None:
    x, positions = entries(decoder, 2, 9)
    whole = decoder(x, positions).hidden
    store, start, pieces = ConcatStore(), 0, []
    for size in chunks:
        pieces.append(decoder(x[:, start : start + size], positions[:, start : start + size], store).hidden)
        start += size
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    assert store.keys.shape == store.values.shape == (3, 2, 2, 9, 8)
    assert torch.equal(store.pos, positions)


def test_a_given_context_continues(decoder: Decoder) -> None:
    x, positions = entries(decoder, 1, 8)
    first = ConcatStore()
    decoder(x[:, :5], positions[:, :5], first)
    second = ConcatStore(first.keys, first.values, first.pos)
    out = decoder(x[:, 5:], positions[:, 5:], second)
    torch.testing.assert_close(out.hidden, decoder(x, positions).hidden[:, 5:])
    assert first.pos.shape == (1, 5), "the context that was given is left as it was"


def test_padding_is_neither_seen_nor_nan(decoder: Decoder) -> None:
    x, positions = entries(decoder, 1, 6)
    padded = torch.cat((torch.full((1, 2, TINY.embed_dim), 7.0, dtype=x.dtype), x[:, :4]), dim=1)
    padded_positions = torch.tensor([[-1, -1, 0, 1, 2, 3]])
    out = decoder(torch.cat((x, padded)), torch.cat((positions, padded_positions))).hidden
    torch.testing.assert_close(out[:1], decoder(x, positions).hidden)
    torch.testing.assert_close(out[1:, 2:], decoder(x[:, :4], positions[:, :4]).hidden)
    assert out.isfinite().all()


def test_gradients_reach_inputs_and_context(decoder: Decoder) -> None:
    assert not any(p.requires_grad for p in decoder.parameters())
    generator = torch.Generator().manual_seed(0)
    kv = [torch.randn(3, 1, 2, 2, 8, dtype=torch.float64, generator=generator) for _ in range(2)]
    x = torch.randn(1, 2, TINY.embed_dim, dtype=torch.float64, generator=generator)
    bias = torch.zeros(1, 2, dtype=torch.float64)

    def run(x: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        store = ConcatStore(k, v, torch.tensor([[0, 1]]), kv_bias=bias)
        return decoder(x, torch.tensor([[2, 3]]), store).hidden

    inputs = [t.requires_grad_() for t in (x, *kv, bias)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_mass_counts_every_query_of_every_head_once(decoder: Decoder) -> None:
    x, positions = entries(decoder, 2, 5)
    out = decoder(x, positions, return_mass=True)
    assert out.mass is not None
    assert out.mass.shape == (3, 2, 5)
    torch.testing.assert_close(out.mass.sum(-1), torch.full((3, 2), 4.0 * 5, dtype=out.mass.dtype))
    assert decoder(x, positions).mass is None


def test_kv_bias_removes_an_entry(decoder: Decoder) -> None:
    x, positions = entries(decoder, 1, 4)
    past = ConcatStore()
    decoder(x[:, :3], positions[:, :3], past)
    closed = torch.tensor([[0.0, -1e9, 0.0]], dtype=torch.float64)
    biased = decoder(x[:, 3:], positions[:, 3:], ConcatStore(past.keys, past.values, past.pos, kv_bias=closed)).hidden
    hole = decoder(x[:, 3:], positions[:, 3:], ConcatStore(past.keys, past.values, torch.tensor([[0, -1, 2]]))).hidden
    torch.testing.assert_close(biased, hole)


def test_stop_and_tap(decoder: Decoder) -> None:
    x, positions = entries(decoder, 1, 4)
    full = decoder(x, positions, hidden_layer=2)
    stopped = decoder(x, positions, stop_layer=2, return_mass=True)
    assert full.tapped is not None
    assert torch.equal(full.tapped, stopped.hidden)
    assert stopped.mass is not None
    assert stopped.mass.shape[0] == 2
    assert torch.equal(decoder(x, positions, stop_layer=0).hidden, x)
    last = decoder(x, positions, hidden_layer=3)
    assert last.tapped is not None
    assert torch.equal(decoder.norm(last.tapped), last.hidden)


def test_nothing_to_run(decoder: Decoder) -> None:
    out = decoder(torch.empty(1, 0, TINY.embed_dim, dtype=torch.float64), torch.empty(1, 0, dtype=torch.int64))
    assert decoder.logits(out.hidden).shape == (1, 0, TINY.vocab_size)


def test_half_precision_stays_close() -> None:
    exact = Decoder.random(TINY, std=0.3)
    half = Decoder.random(TINY, std=0.3, dtype=torch.bfloat16)
    x, positions = entries(exact, 1, 12)
    a, b = exact(x, positions).hidden, half(x.bfloat16(), positions).hidden
    assert b.dtype == torch.bfloat16
    assert (a - b.float()).abs().mean() < 0.05


def test_what_does_not_fit_is_named(decoder: Decoder) -> None:
    x, positions = entries(decoder, 1, 4)
    with pytest.raises(InputError, match="x: expected"):
        decoder(x.float(), positions)
    with pytest.raises(InputError, match="x: expected"):
        decoder(x[..., :5], positions)
    with pytest.raises(InputError, match="positions: expected"):
        decoder(x, positions.int())
    with pytest.raises(InputError, match="stop_layer"):
        decoder(x, positions, stop_layer=4)
    with pytest.raises(InputError, match="hidden_layer"):
        decoder(x, positions, stop_layer=1, hidden_layer=2)
    with pytest.raises(InputError, match="ConcatStore"):
        ConcatStore(x, None, positions)
    with pytest.raises(InputError, match="ConcatStore"):
        ConcatStore(x, x, positions)


needs_library = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")


def behind_others(decoder: Decoder, batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and cached keys and values of `length` entries behind 9 others."""
    x, positions = entries(decoder, batch, 9 + length)
    cache = KVCache.allocate(TINY, 64, batch=batch, dtype=decoder.dtype, device="cpu", weighted=True)
    cache.pos[:, : 9 + length] = positions
    for part in (slice(0, 9), slice(9, 9 + length)):
        writer = cache.writer(positions[:, part], 9 + length)
        hidden = decoder(x[:, part], positions[:, part], writer).hidden
    return decoder.logits(hidden), cache.data[:, :, :, :, 9 : 9 + length]


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 2)])
def test_few_rows_agree_with_matrix_products(
    batch: int, length: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [Decoder.random(TINY, std=0.3, dtype=torch.float64), Decoder.random(TINY, std=0.3, dtype=dtype)]
    # The oracle has the rounded weights.
    models[0].load_state_dict(models[1].state_dict())
    calls = count_fused(monkeypatch)
    with torch.no_grad():
        exact = behind_others(models[0], batch, length)
        assert not calls
        fused = behind_others(models[1], batch, length)
        assert len(calls) == 1, "the logits; layers over a slot cache are one call"
        monkeypatch.setattr(decoder_module, "MOST_FUSED_ROWS", 0)
        plain = behind_others(models[1], batch, length)
    for name, got, want, rival in zip(("logits", "cache"), fused, exact, plain, strict=True):
        assert_within_error_rule(got, want, rival, what=name)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [x for x in native.isa_levels() if x not in ("scalar", "amx-emulated")])
def test_many_rows_are_native_too(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library has vectors: no product of torch's."""
    exact, model = Decoder.random(TINY, std=0.3, dtype=torch.float64), Decoder.random(TINY, std=0.3, dtype=dtype)
    exact.load_state_dict(model.state_dict())

    def refuse(*args: object) -> None:
        raise AssertionError("a product of torch's")

    try:
        native.library().set_cpu_isa(level)
        with torch.no_grad():
            want = behind_others(exact, 2, 50)
            with monkeypatch.context() as m:
                m.setattr(torch.nn.functional, "linear", refuse)
                got = behind_others(model, 2, 50)
            monkeypatch.setattr(native, "vectorised", lambda: False)
            monkeypatch.setattr(decoder_module, "MOST_FUSED_ROWS", 0)
            plain = behind_others(model, 2, 50)
    finally:
        native.library().set_cpu_isa(None)
    for name, a, b, rival in zip(("logits", "cache"), got, want, plain, strict=True):
        assert_within_error_rule(a, b, rival, what=name)


def count_fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of `fused_linear` from now on, where a decoder runs at most 8 rows through it."""
    calls: list[int] = []

    def counting(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(x.numel() // x.shape[-1])
        return fused_linear(x, *args, **kwargs)

    fused_linear = decoder_module.fused_linear
    for module in (decoder_module, layers_module):
        monkeypatch.setattr(module, "fused_linear", counting)
    monkeypatch.setattr(decoder_module, "MOST_FUSED_ROWS", 8)
    monkeypatch.setattr(native, "vectorised", lambda: False)
    return calls


@needs_library
def test_who_needs_more_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, a hook on a part of a layer, many rows, no library."""
    model = Decoder.random(TINY)
    calls = count_fused(monkeypatch)
    x, positions = entries(model, 1, 1)
    model.logits(model(x, positions).hidden)
    assert not calls, "gradients could be asked for"
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        handle = model.layers[1].attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        want = model(x, positions).hidden
        assert len(seen) == 1
        assert not calls
        handle.remove()
        model(*entries(model, 3, 3))
        assert not calls, "nine rows"
        torch.testing.assert_close(model(x, positions).hidden, want)
        assert calls == [1] * 4 * TINY.n_layers
        monkeypatch.setattr(native, "available", lambda: "hidden by the test")
        calls.clear()
        model.logits(model(x, positions).hidden)
        assert not calls
