"""GGUF files: conversion, and the cache of converted models."""

import threading
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from test_model_tiny import assert_same_logits, tiny
from transformers import PreTrainedModel

from mc_runtime.errors import ModelError
from mc_runtime.model import cache_dir, load_model, resolve_model
from mc_runtime.model import resolve as resolve_module


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """llama.cpp's row order: of each head, row b and row b + D/2 alternate."""
    d = weight.shape[0] // heads
    order = [h * d + half * d // 2 + b for h in range(heads) for b in range(d // 2) for half in range(2)]
    return weight[order].numpy()


Quantised = Callable[[str, np.ndarray], gguf.GGMLQuantizationType | None]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    factors: np.ndarray | None = None,
    pre: str = "smollm",
    quantised: Quantised = lambda name, array: None,
) -> None:
    """`model` as llama.cpp would store it, with the tokenizer of `write_tokenizer`. quantised: a tensor's kind."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if family == "qwen3":
        writer.add_key_length(config.head_dim)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, "ab", "<s>", "</s>", *(f"<extra {i}>" for i in range(41))])
    writer.add_token_types([1] * 257 + [3] * 43)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_add_bos_token(True)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name not in names:
            _, _, layer, *middle, kind = name.split(".")
            names[name] = f"blk.{layer}.{parts['.'.join(middle)]}.{kind}"
            if family == "llama" and middle[-1] in ("q_proj", "k_proj"):
                heads = config.num_attention_heads if middle[-1] == "q_proj" else config.num_key_value_heads
                array = permuted(tensor, heads)
        kind, array = quantised(names[name], array), np.ascontiguousarray(array)
        if kind is None:
            writer.add_tensor(names[name], array)
        else:
            writer.add_tensor(names[name], gguf.quants.quantize(array, kind), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("case", ["llama", "llama3-rope", "qwen2", "qwen3"])
def test_gguf_conversion(case: str, tmp_path: Path, cache: Path) -> None:
    assert cache_dir() == cache
    (tmp_path / "peer").mkdir()
    peer = tiny(tmp_path / "peer", case)
    factors = None
    if case == "llama3-rope":
        plain = 500.0 ** (-torch.arange(0, 12, 2) / 12)
        factors = (plain / peer.model.rotary_emb.inv_freq).numpy()
    write_gguf(tmp_path / "model.gguf", peer, factors)
    loaded = load_model(tmp_path / "model.gguf", dtype=torch.float32, device="cpu")
    assert_same_logits(loaded, peer)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("ab 12 é")) == "ab 12 é"
    assert loaded.tokenizer.prefix_ids == (257,)
    assert loaded.config.bos_id == 257
    assert loaded.tokenizer.eos_ids == (258,)


def test_damaged_cache_is_rebuilt(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "model.gguf", tiny(tmp_path))
    folder = resolve_model(tmp_path / "model.gguf")
    good = load_model(folder).fingerprint
    weights = folder / "model.safetensors"

    def flip_weights() -> None:
        content = bytearray(weights.read_bytes())
        content[-len(content) // 2 :] = bytes(len(content) // 2 + len(content) % 2)
        weights.write_bytes(content)

    damages = [
        lambda: weights.write_bytes(weights.read_bytes()[:-100]),
        flip_weights,
        lambda: (folder / "tokenizer.json").write_text("{}"),
        lambda: (folder / "config.json").unlink(),
        lambda: (folder / "manifest.json").unlink(),
    ]
    for damage in damages:
        damage()
        assert not resolve_module.is_whole(folder)
        assert load_model(tmp_path / "model.gguf").fingerprint == good
    assert sorted(p.suffix for p in (cache / "models").iterdir()) == sorted([folder.suffix, ".lock"]), "no leftovers"


def test_many_at_once_convert_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", tiny(tmp_path))
    calls, real = [], resolve_module.convert_gguf
    monkeypatch.setattr(resolve_module, "convert_gguf", lambda *a: (calls.append(a), real(*a)))
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model(tmp_path / "model.gguf"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(set(found)) == 1
    assert len(found) == 4


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "model.gguf", tiny(tmp_path), pre="martian")
    with pytest.raises(ModelError, match="pre-tokenizer 'martian'"):
        load_model(tmp_path / "model.gguf")
    (tmp_path / "torn.gguf").write_bytes((tmp_path / "model.gguf").read_bytes()[:3000])
    (tmp_path / "text.gguf").write_text("not a model at all, though long enough to hold a header")
    for name in ("torn.gguf", "text.gguf"):
        with pytest.raises(ModelError, match="not a readable GGUF"):
            load_model(tmp_path / name)
    assert {p.suffix for p in (cache / "models").iterdir()} == {".lock"}
    (tmp_path / "blocked").write_text("a file where the cache folder should be")
    monkeypatch.setenv("MC_CACHE", str(tmp_path / "blocked"))
    with pytest.raises(ModelError, match="set MC_CACHE"):
        load_model(tmp_path / "model.gguf")


def test_gguf_of_another_architecture(tmp_path: Path, cache: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gpt2")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="architecture 'gpt2' is not supported"):
        load_model(tmp_path / "model.gguf")
