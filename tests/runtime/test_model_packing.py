"""Quantised GGUF files keep their codes: what is packed, how it is loaded, and that decode steps read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_model_gguf import write_gguf
from test_model_tiny import SHAPE, write_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mc_kernels import native
from mc_kernels.packed_weight import packed_bits, unpack_weight
from mc_runtime.engines import make_engine
from mc_runtime.errors import ModelError
from mc_runtime.model import load_model, resolve_model
from mc_runtime.model import resolve as resolve_module
from mc_runtime.model.layers import Linear
from mc_runtime.model.packing import FILE, pack_rows

reads_packed = pytest.mark.skipif(native.available() is not None, reason=f"no native library: {native.available()}")
KINDS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}


def model_file(directory: Path, kind: str, *, tied: bool = True, apart: str | None = None) -> Path:
    """A tiny Llama of which all matrices are quantised; those with `apart` in their name in 8 bits."""
    directory.mkdir(exist_ok=True)
    torch.manual_seed(0)
    sizes = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 304}
    peer = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()
    for name, parameter in peer.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    write_tokenizer(directory)

    def quantised(name: str, array: np.ndarray) -> gguf.GGMLQuantizationType | None:
        if array.ndim != 2:
            return None
        return gguf.GGMLQuantizationType["Q8_0" if apart is not None and apart in name else kind]

    write_gguf(directory / "model.gguf", peer, quantised=quantised)
    return directory / "model.gguf"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "cache"))


def linears(decoder: Any) -> list[Linear]:
    """All linear maps of the layers."""
    parts = ((a.attention.qkv, a.attention.out, a.ffn.gate_up, a.ffn.down) for a in decoder.layers)
    return [m for layer in parts for m in layer]


@reads_packed
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_those_of_the_file(tmp_path: Path, kind: str, tied: bool) -> None:
    path = model_file(tmp_path / "m", kind, tied=tied)
    for dtype in (torch.bfloat16, torch.float32):
        decoder = load_model(path, dtype=dtype, device="cpu").decoder
        places = [(m.packed, m.weight) for m in linears(decoder)] + [(decoder.head_packed, decoder.head)]
        for packed, weight in places:
            assert packed is not None
            assert packed_bits(packed.data) == KINDS[kind]
            assert torch.equal(unpack_weight(packed.data, *weight.shape).to(dtype), weight)
    half = load_model(path, dtype=torch.float16, device="cpu").decoder
    assert half.head_packed is None
    assert all(m.packed is None for m in linears(half))


def test_another_engine_finds_nothing_but_the_weights_in_the_folder(tmp_path: Path) -> None:
    """vLLM, like others, loads every *.safetensors that it finds."""
    folder = resolve_model(model_file(tmp_path / "m", "Q4_1"))
    assert (folder / FILE).is_file()
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]


@reads_packed
def test_a_decode_step_reads_them_and_agrees(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m", "Q4_1")
    ids = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(1))
    logits = {}
    for name in ("packed", "dense", "packed fp32", "exact"):
        dtype = torch.float32 if name in ("packed fp32", "exact") else torch.bfloat16
        model = load_model(path, dtype=dtype, device="cpu")
        if name in ("dense", "exact"):
            model.decoder.head_packed = None
            for m in linears(model.decoder):
                m.packed = None
        engine = make_engine("native", model.decoder)
        with torch.inference_mode():
            reading = engine.prefill(engine.embed(ids[None, :40])[0], room=20)
            for token in ids[40:].tolist():
                reading.decode(token)
            logits[name] = reading.logits.double()
    error, rival = ((logits[n] - logits["exact"]).norm() for n in ("packed", "dense"))
    assert 0 < error <= 2 * rival
    assert not torch.equal(logits["packed"], logits["dense"])
    assert 0 < (logits["packed fp32"] - logits["exact"]).norm() <= 1e-5 * logits["exact"].norm()


@reads_packed
def test_rows_quantised_in_different_ways_stay_as_they_are(tmp_path: Path) -> None:
    loaded = load_model(model_file(tmp_path / "m", "Q4_0", apart="attn_v"), dtype=torch.bfloat16, device="cpu")
    assert [m.packed is None for m in linears(loaded.decoder)] == [True, False, False, False] * 2


@reads_packed
def test_a_model_that_was_loaded_in_inference_mode_has_none(tmp_path: Path) -> None:
    with torch.inference_mode():
        loaded = load_model(model_file(tmp_path / "m", "Q4_0"), dtype=torch.bfloat16, device="cpu")
    assert all(m.packed is None for m in linears(loaded.decoder))


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    path = model_file(tmp_path / "m", "Q4_1")
    folder = resolve_model(path)
    whole = (folder / FILE).read_bytes()
    for damage in (lambda f: f.write_bytes(whole[:-10]), lambda f: f.unlink()):
        damage(folder / FILE)
        assert not resolve_module.is_whole(folder)
        assert (resolve_model(path) / FILE).read_bytes() == whole


@reads_packed
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = resolve_model(model_file(tmp_path / "m", "Q4_1"))
    (folder / FILE).write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"packed\.weights cannot be used"):
        load_model(folder, dtype=torch.bfloat16, device="cpu")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_any_bytes_of_a_format(kind: str) -> None:
    """Every code and scale that a file can hold, against gguf's own reading."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (16, 2 * size), dtype=np.uint8)
    halves = raw.reshape(16, 2, size)
    for at in (0, 2) if kind in ("Q4_1", "Q4_K") else (0,):
        halves[..., at : at + 2] = rng.normal(size=(16, 2, 1)).astype(np.float16).view(np.uint8)
    values = gguf.quants.dequantize(raw, number)
    assert values.shape == (16, 2 * block)
    packed = pack_rows(kind, raw, values, lambda part: part[::-1])
    assert packed is not None
    assert torch.equal(unpack_weight(packed, 16, 2 * block), torch.from_numpy(values[::-1].copy()))


def test_what_cannot_be_packed_is_passed_over() -> None:
    number = gguf.GGMLQuantizationType.Q4_1
    values = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    raw = gguf.quants.quantize(values, number)
    exact = gguf.quants.dequantize(raw, number)
    assert pack_rows("Q4_1", raw[:16], exact[:16], lambda x: x) is not None
    assert pack_rows("Q4_1", raw, exact, lambda x: x) is None  # 24 rows
    assert pack_rows("Q6_K", raw[:16], exact[:16], lambda x: x) is None
    assert pack_rows("F32", values[:16].view(np.uint8), values[:16], lambda x: x) is None
    assert pack_rows("Q4_1", raw[:16], exact[:16] + 1, lambda x: x) is None  # not what the bytes say
