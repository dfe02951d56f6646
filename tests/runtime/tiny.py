"""A tiny random Llama with a byte tokenizer: every path of the runtime in milliseconds."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from mc_runtime.model import ChatTemplate, Decoder, LoadedModel, ModelConfig, RopeConfig, Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = inner.token_to_id("<|im_end|>")
    assert end is not None
    return Tokenizer(inner, eos_ids=(end,))


def tiny_model(
    seed: int = 0, dtype: torch.dtype = torch.float32, max_positions: int = 4096, device: str = "cpu"
) -> LoadedModel:
    tokenizer = tiny_tokenizer()
    config = ModelConfig(
        architecture="llama",
        vocab_size=tokenizer.vocab_size,
        embed_dim=32,
        n_layers=3,
        n_heads=4,
        n_kv_heads=2,
        head_dim=8,
        ffn_dim=48,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        max_positions=max_positions,
        tied_embeddings=True,
        eos_ids=tuple(tokenizer.eos_ids),
    )
    # Weights large enough that attention is peaked: an error in what is attended to must show in the logits.
    decoder = Decoder.random(config, seed=seed, std=0.3, dtype=dtype, device=torch.device(device))
    return LoadedModel(decoder, tokenizer, ChatTemplate(tokenizer, CHATML), config, f"tiny-{seed}", Path("tiny"))
