"""Layers of a decoder as one native call: the same bits as one by one, and whom it leaves to the modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mc_kernels import RopeSpec, native
from mc_kernels.decoder_layers import DecoderLayers
from mc_runtime.errors import InputError
from mc_runtime.kv_cache import KVCache
from mc_runtime.model import Decoder, DecoderOutput, ModelConfig, RopeConfig
from mc_runtime.model.layers import Linear
from mc_runtime.model.native_layers import NativeLayers

pytestmark = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")

LLAMA = ModelConfig(
    architecture="llama", vocab_size=50, embed_dim=48, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=80,
    norm_eps=1e-5, rope=RopeConfig(), max_positions=64, tied_embeddings=True,
)  # fmt: skip
FAMILIES = {
    "llama": LLAMA,
    "llama3": replace(LLAMA, out_bias=True, qkv_bias=True, rope=RopeConfig(kind="llama3", original_max_positions=32)),
    "mistral": replace(LLAMA, architecture="mistral", head_dim=16, tied_embeddings=False),
    "qwen2": replace(LLAMA, architecture="qwen2", qkv_bias=True, rope=RopeConfig(kind="yarn", factor=2.0,
                     original_max_positions=32, attention_scaling=1.07)),
    "qwen3": replace(LLAMA, architecture="qwen3", qk_norm=True, head_dim=32),
}  # fmt: skip
USED = 40


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every forward that could be one call: whether it was."""
    seen: list[bool] = []
    run = NativeLayers.run

    def noting(self: NativeLayers, *args: object) -> object:
        done = run(self, *args)  # type: ignore[arg-type]
        seen.append(done is not None)
        return done

    monkeypatch.setattr(NativeLayers, "run", noting)
    return seen


def random_decoder(config: ModelConfig = LLAMA, dtype: torch.dtype = torch.float32) -> Decoder:
    decoder = Decoder.random(config, std=0.2, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in decoder.named_parameters():
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder


def step(
    decoder: Decoder, *, batch: int = 1, length: int = 1, weighted: bool = True, mass: bool = False,
    stop: int | None = None, hidden: int | None = None, logits: bool = False,
) -> tuple[DecoderOutput, Tensor]:  # fmt: skip
    """A forward over a cache that others have filled, and the cache after it."""
    generator = torch.Generator().manual_seed(2)
    cache = KVCache.allocate(decoder.config, 44, batch=batch, dtype=decoder.dtype, device="cpu", weighted=weighted)
    cache.data.copy_(torch.randn(cache.data.shape, generator=generator))
    cache.pos[:, :USED] = torch.arange(USED)
    if cache.bias is not None:
        cache.bias.copy_(torch.randn(cache.bias.shape, generator=generator))
    slots = torch.stack([torch.randperm(USED, generator=generator)[:length] for _ in range(batch)])
    x = torch.randn(batch, length, decoder.config.embed_dim, generator=generator).to(decoder.dtype)
    writer = cache.writer(slots, USED)
    output = decoder(x, slots, writer, return_mass=mass, stop_layer=stop, hidden_layer=hidden, logits=logits)
    return output, cache.data


def one_by_one(decoder: Decoder, **how: object) -> tuple[DecoderOutput, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NativeLayers, "run", lambda *_: None)
        return step(decoder, **how)  # type: ignore[arg-type]


# The norm at the end is torch's where layers are called one by one: another order of sums.
NORMED = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def assert_same(
    got: tuple[DecoderOutput, Tensor], want: tuple[DecoderOutput, Tensor], rtol: float = 0.0, *, normed: bool = True
) -> None:
    pairs = {"cache": (got[1], want[1])}
    pairs |= {n: (getattr(got[0], n), getattr(want[0], n)) for n in ("hidden", "mass", "tapped")}
    for name, (a, b) in pairs.items():
        assert (a is None) == (b is None)
        if a is not None:
            room = max(rtol, NORMED[a.dtype]) if normed and name == "hidden" else rtol
            torch.testing.assert_close(a, b, rtol=room, atol=room)


@pytest.mark.parametrize("level", native.isa_levels(matrix=False))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_bits_of_its_layers(
    family: str, dtype: torch.dtype, level: str, calls: list[bool]
) -> None:
    decoder = random_decoder(FAMILIES[family], dtype)
    # Of Qwen3 the norm of a head is torch's there, rounded between its parts.
    rtol = 0.0 if family != "qwen3" else 1e-5 if dtype == torch.float32 else 0.06
    native.library().set_cpu_isa(level)
    try:
        for how in ({}, {"batch": 2, "length": 3, "mass": True, "hidden": 1}, {"weighted": False, "length": 32}):
            assert_same(step(decoder, **how), one_by_one(decoder, **how), rtol)
    finally:
        native.library().set_cpu_isa(None)
    assert calls == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", [None, "hook", "norm"])
def test_logits_come_with_the_layers(change: str | None, dtype: torch.dtype, calls: list[bool]) -> None:
    decoder, heads = random_decoder(FAMILIES["mistral"], dtype), []
    if change == "hook":
        decoder.layers[1].register_forward_hook(lambda *_: None)
    elif change == "norm":
        decoder.norm.register_forward_hook(lambda module, given, out: out * 2)
    of_call = decoder.logits
    decoder.logits = lambda hidden: heads.append(hidden) or of_call(hidden)  # type: ignore[method-assign, func-returns-value]
    for how in ({}, {"batch": 2, "length": 3, "mass": True, "hidden": 1}):
        output, _ = step(decoder, logits=True, **how)  # type: ignore[arg-type]
        assert output.logits is not None
        assert torch.equal(output.logits, of_call(output.hidden[:, -1]))
        assert step(decoder, **how)[0].logits is None  # type: ignore[arg-type]
    assert bool(heads) == (change is not None)
    for wrong in ({"stop": 2}, {"length": 0}):
        with pytest.raises(InputError, match="logits: expected all layers and at least one entry a row"):
            step(decoder, logits=True, **wrong)


@pytest.mark.parametrize(
    "how",
    [{"stop": 2}, {"stop": 2, "hidden": 2}, {"stop": 2, "hidden": 1, "mass": True}, {"hidden": 0}, {"hidden": 3}],
)
def test_some_layers(how: dict[str, int], calls: list[bool]) -> None:
    decoder = random_decoder()
    assert_same(step(decoder, **how), one_by_one(decoder, **how), normed="stop" not in how)  # type: ignore[arg-type]
    assert calls == [True]


def other_rope(decoder: Decoder) -> None:
    decoder.rope = RopeSpec.from_theta(500.0, 64)


def other_module(decoder: Decoder) -> None:
    like = random_decoder(replace(LLAMA, vocab_size=60))
    decoder.layers[1].ffn = like.layers[2].ffn


def other_layers(decoder: Decoder) -> None:
    decoder.layers = random_decoder(replace(LLAMA, qkv_bias=True)).layers


def other_state(decoder: Decoder) -> None:
    decoder.load_state_dict({name: x * 0.9 for name, x in decoder.state_dict().items()})


def other_bias(decoder: Decoder) -> None:
    decoder.layers[0].attention.out.bias = nn.Parameter(torch.ones(48), requires_grad=False)  # type: ignore[union-attr]


def other_eps(decoder: Decoder) -> None:
    for module in decoder.modules():
        if hasattr(module, "eps"):
            module.eps = 0.5


def in_place(decoder: Decoder) -> None:
    decoder.layers[2].attention.qkv.weight.mul_(-1)  # type: ignore[union-attr, operator]


def by_data(decoder: Decoder) -> None:
    decoder.layers[2].ffn.down.weight.data = torch.ones(48, 80)  # type: ignore[union-attr]


def other_norm(decoder: Decoder) -> None:
    decoder.norm.weight = nn.Parameter(torch.linspace(0.5, 2, 48), requires_grad=False)


def own_norm(decoder: Decoder) -> None:
    decoder.norm = nn.Sequential(nn.Tanh())  # type: ignore[assignment]


def hooked_norm(decoder: Decoder) -> None:
    decoder.norm.register_forward_hook(lambda module, given, out: out * 2)


def eps_of_the_norm(decoder: Decoder) -> None:
    decoder.norm.eps = 0.5


def other_parameter(decoder: Decoder) -> None:
    decoder.layers[1].ffn_norm.weight = nn.Parameter(torch.ones(48), requires_grad=False)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [
        other_rope, other_module, other_layers, other_state, other_bias, other_eps, in_place, by_data, other_parameter,
        other_norm, own_norm, hooked_norm, eps_of_the_norm,
    ],
)  # fmt: skip
def test_what_changes_is_seen(change: Callable[[Decoder], None], calls: list[bool]) -> None:
    decoder = random_decoder()
    before = step(decoder)
    change(decoder)
    got = step(decoder)
    assert_same(got, one_by_one(decoder))
    assert not torch.equal(got[0].hidden, before[0].hidden)
    assert calls == [True, True]


def test_other_dtypes_are_seen(calls: list[bool]) -> None:
    decoder = random_decoder()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float32):
        decoder.to(dtype)
        assert_same(step(decoder), one_by_one(decoder))
    assert calls == [True] * 4


class Louder(Linear):
    def fused(self, x: Tensor, **how: object) -> Tensor:  # type: ignore[override]
        return super().fused(x, **how) * 2  # type: ignore[arg-type]


def hooked_part(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    decoder.layers[1].ffn.down.register_forward_hook(lambda module, given, out: out + 1)  # type: ignore[union-attr]


def hooked_layer(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    decoder.layers[1].register_forward_hook(lambda module, given, out: (out[0] + 1, out[1]))


def hooked_later(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    step(decoder)
    hooked_layer(decoder, patch)


def own_class(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    decoder.layers[0].attention.out.__class__ = Louder  # type: ignore[union-attr]


def named_backend(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("MC_BACKEND", "ref")


def different_eps(decoder: Decoder, patch: pytest.MonkeyPatch) -> None:
    decoder.layers[0].ffn_norm.eps = 0.5  # type: ignore[union-attr]


@pytest.mark.parametrize("why", [hooked_part, hooked_layer, hooked_later, own_class, named_backend, different_eps])
def test_who_needs_the_modules_gets_them(
    why: Callable[[Decoder, pytest.MonkeyPatch], None], calls: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = random_decoder()
    plain = step(decoder)
    why(decoder, monkeypatch)
    got = step(decoder)
    assert calls[-1] is False
    assert_same(got, one_by_one(decoder))
    if why is not named_backend:
        assert not torch.allclose(got[0].hidden, plain[0].hidden)


def test_a_hook_on_all_modules_is_called(calls: list[bool]) -> None:
    decoder, seen = random_decoder(), []
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, given: seen.append(type(module)))
    step(decoder)
    handle.remove()
    assert len(seen) > LLAMA.n_layers
    step(decoder)
    assert calls == [False, True]


def test_gradients_and_other_stores_take_the_modules(calls: list[bool]) -> None:
    decoder = random_decoder()
    x, positions = torch.ones(1, 2, 48), torch.arange(2)[None]
    decoder(x, positions)
    assert calls == [False]
    with torch.enable_grad():
        step(decoder)
    assert calls == [False], "not asked: gradients"
    step(decoder, length=20, batch=2)
    assert calls == [False] + [True] * native.vectorised(), "without vectors not asked: forty rows"


def test_copies_start_afresh(calls: list[bool]) -> None:
    decoder = random_decoder()
    want = step(decoder)
    for twin in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert_same(step(twin), want)
        twin.layers[0].ffn.down.weight.zero_()
        assert not torch.equal(step(twin)[0].hidden, want[0].hidden)
    assert_same(step(decoder), want)
    assert calls == [True] * 6


def test_it_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, init = [], DecoderLayers.__init__

    def counting(self: DecoderLayers, *args: object, **how: object) -> None:
        made.append(self)
        init(self, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(DecoderLayers, "__init__", counting)
    decoder = random_decoder()
    for _ in range(3):
        step(decoder)
    assert len(made) == 1


def test_threads_share_a_decoder() -> None:
    decoder = random_decoder(dtype=torch.bfloat16)
    want = step(decoder, length=2)

    def run(_: int) -> tuple[DecoderOutput, Tensor]:
        with torch.no_grad():
            return step(decoder, length=2)

    decoder = copy.deepcopy(decoder)  # not prepared: all threads find that
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(run, range(16)):
            assert_same(got, want)
