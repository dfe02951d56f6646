"""Tiny random models of transformers, and what their tests share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from mc_kernels.integrations.transformers import WorkingContextCache, attach, attachment_of, detach
from mc_kernels.rope import apply_rope

VOCAB = 97
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
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
# Six of Gemma 3's layers see a window and rotate by another theta, the seventh sees everything.
GEMMA3 = SHAPE | {"head_dim": 16, "num_hidden_layers": 7, "sliding_window": 24}
# The sixth sees everything and rotates a quarter of its frequencies, by a theta of its own. Heads of one width.
GEMMA4 = SHAPE | {"head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 6, "sliding_window": 24}
GEMMA4 |= {"hidden_size_per_layer_input": 0}
# Capped so low that it shows; older versions of transformers forget the cap in their default attention. Every other
# layer sees a window.
GEMMA2 = SHAPE | {"head_dim": 16, "sliding_window": 24, "attn_logit_softcapping": 1.5, "final_logit_softcapping": 9.0}
GEMMA2 |= {"attn_implementation": "eager"}
# Sinks in the softmax, under YaRN. Transformers' fast experts take no fp64.
GPT_OSS = SHAPE | {"head_dim": 16, "sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1}
GPT_OSS |= {"rope_parameters": YARN, "experts_implementation": "eager"}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SHAPE),
    "llama3-rope": ("LlamaForCausalLM", "LlamaConfig", SHAPE | {"rope_parameters": LLAMA3}),
    "yarn": ("LlamaForCausalLM", "LlamaConfig", SHAPE | {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SHAPE | {"sliding_window": 24}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SHAPE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SHAPE | {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SHAPE | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA3),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig", GEMMA4),
    "phi": ("PhiForCausalLM", "PhiConfig", SHAPE | {"partial_rotary_factor": 0.5}),
    "glm": ("GlmForCausalLM", "GlmConfig", SHAPE | {"head_dim": 16}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", GPT_OSS),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SHAPE),
}


def build(case: str, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    """The same weights for each call; biases and norms are drawn too, or a swapped one would not show."""
    model_class, config_class, settings = CASES[case]
    torch.manual_seed(0)
    model = getattr(hf, model_class)(getattr(hf, config_class)(**copy.deepcopy(settings))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


@contextmanager
def attached(model: hf.PreTrainedModel) -> Iterator[hf.PreTrainedModel]:
    attach(model)
    try:
        yield model
    finally:
        detach(model)


def random_ids(batch: int, length: int, seed: int = 0) -> Tensor:
    """Without 0, the padding."""
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def named(model: hf.PreTrainedModel, cache: hf.Cache) -> dict[str, Any]:
    """The cache by the name that this version of transformers has for it."""
    return {attachment_of(model).cache_argument: cache}


@torch.no_grad()
def run(model: hf.PreTrainedModel, cache: WorkingContextCache, ids: Tensor, **more: Any) -> Tensor:
    return model(ids, **named(model, cache), **more).logits


def by_rank(cache: WorkingContextCache, row: int = 0) -> tuple[Tensor, Tensor]:
    return cache.read(0, cache.lengths[row], row=row)


@torch.no_grad()
def plain_logits(model: hf.PreTrainedModel, cache: WorkingContextCache, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """What a fresh model of the same weights makes of `ids` [1, T] over the entries of an (attached) model's cache,
    rotated at their ranks and put into transformers' own cache: a context from scratch, without ours."""
    k, v = by_rank(cache)
    ropes = [layer.rope for layer in attachment_of(model).layers]
    case = next(name for name, (kind, _, _) in CASES.items() if kind == type(model).__name__ and fits(model, name))
    peer, own, ranks = build(case, dtype), hf.DynamicCache(), torch.arange(k.shape[2])
    for layer, rope in enumerate(ropes):
        assert rope is not None
        own.update(apply_rope(k[layer, None].double(), ranks, rope).to(dtype), v[layer, None].to(dtype), layer)
    positions = torch.arange(len(ranks), len(ranks) + ids.shape[1])[None]
    mask = torch.ones(1, len(ranks) + ids.shape[1], dtype=torch.int64)
    argument = attachment_of(model).cache_argument
    return peer(ids, **{argument: own}, position_ids=positions, attention_mask=mask).logits


def fits(model: hf.PreTrainedModel, case: str) -> bool:
    """Whether a case's settings are a model's: several cases share a class."""
    kind = CASES[case][2].get("rope_parameters", {}).get("rope_type", "default")
    return bool(model.config.rope_parameters.get("rope_type", "default") == kind)
