"""A model of transformers over a decoder's weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mc_kernels import fused_linear
from mc_runtime.errors import ModelError
from mc_runtime.model import Decoder, ModelConfig
from mc_runtime.model.decoder import fuses
from mc_runtime.model.weights import tensor_places

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
}


class FusedLinear(nn.Linear):
    """`nn.Linear` whose rows on a CPU go through `fused_linear` where the decoder's do (`fuses`): it reads weights at
    the rate of memory, which is what a decode step waits for. Results agree within rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return fused_linear(x, self.weight, bias=self.bias) if fuses(x) else super().forward(x)


def transformers_model(decoder: Decoder, *, fused: bool = False) -> PreTrainedModel:
    """The decoder as transformers' class of its family, frozen. The two share their weights: parameters are views.
    fused: its linear maps are `FusedLinear`.

    Raises ModelError for partial rotary embeddings, which these classes do not have.
    """
    c = decoder.config
    if c.rope.partial_factor != 1.0:
        raise ModelError(f"transformers' {c.architecture} rotates whole heads; this model {c.rope.partial_factor:g}")
    config_class, model_class = CLASSES[c.architecture]
    with torch.device("meta"):
        model: Any = getattr(transformers, model_class)(getattr(transformers, config_class)(**_settings(c)))
        if fused:
            for name, part in list(model.named_modules()):
                if type(part) is nn.Linear:
                    own = FusedLinear(part.in_features, part.out_features, bias=part.bias is not None)
                    model.set_submodule(name, own)
    weights = tensor_places(decoder) | {"lm_head.weight": decoder.head}
    model.load_state_dict(weights, strict=True, assign=True)
    # Frequencies are no weights: they were computed on the meta device. The decoder's schedules include GGUF's own.
    rotary, inv_freq = model.model.rotary_emb, decoder.rope.inv_freq.to(decoder.device)
    rotary.inv_freq, rotary.original_inv_freq = inv_freq, inv_freq.clone()
    rotary.attention_scaling = decoder.rope.attention_scaling
    left = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    if left:
        raise ModelError(f"transformers {transformers.__version__}: {model_class} has {left[0]}, which is not known")
    built: PreTrainedModel = model.requires_grad_(False).eval()
    return built


def _settings(c: ModelConfig) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.ffn_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "max_position_embeddings": c.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope.theta},
        "tie_word_embeddings": c.tied_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": list(c.eos_ids) or None,
        "pad_token_id": None,
        "sliding_window": None,
    }
    if c.architecture in ("llama", "qwen3"):
        settings["attention_bias"] = c.qkv_bias
    if c.architecture == "llama":
        del settings["sliding_window"]
    return settings
