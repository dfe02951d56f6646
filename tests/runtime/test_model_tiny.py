"""Tiny random models of every architecture against transformers; their builders serve the other model tests."""

from pathlib import Path
from typing import Any

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

from mc_runtime.model import LoadedModel, load_model

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
