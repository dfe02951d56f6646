"""GGUF -> a Hugging Face directory (config.json, model.safetensors, tokenizer.json, chat template), and packed weights.

llama.cpp's files hold the weights quantised in blocks, the query and key rows of Llama models permuted for interleaved
RoPE, and the tokenizer as lists. Values are stored in the narrowest of bf16, fp16 and fp32 that holds the dequantised
ones exactly: a converted model computes what the quantised one does. Linear maps in 4 or 8 bits are kept as such
too (`packing`), for decode steps.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mc_runtime.errors import ModelError
from mc_runtime.model.gguf_tokenizer import tokenizer_json
from mc_runtime.model.packing import pack_rows, save_packed

VERSION = 3
"""Counted up when the conversion changes, so that folders of an older one are not used."""

FAMILIES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"


def convert_gguf(source: Path, directory: Path) -> None:
    """Write the model in `source` to the existing, empty `directory`. Raises `ModelError` for an unsupported file."""
    import gguf

    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ModelError(f"{source} is not a readable GGUF file: {error}") from error
    meta = {name: field.contents() for name, field in reader.fields.items()}
    family = meta.get("general.architecture")
    if family not in FAMILIES:
        raise ModelError(f"{source}: architecture {family!r} is not supported; known: {', '.join(FAMILIES)}")
    try:
        weights = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        config = _config(meta, family, weights)
        tokenizer = tokenizer_json(meta)
        renamed = {_rename(name): _restored(name, array, config) for name, array in _wanted(weights).items()}
        packed = {
            _rename(t.name): pack_rows(
                t.tensor_type.name, t.data, weights[t.name], partial(_restored, t.name, config=config)
            )
            for t in reader.tensors
            if t.name.startswith(("blk.", "output." if "output.weight" in weights else "token_embd."))
        }
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"{source} cannot be converted: {type(error).__name__}: {error}") from error
    save_file({name: _narrowest(array) for name, array in renamed.items()}, directory / "model.safetensors")
    save_packed(directory, {name: x for name, x in packed.items() if x is not None})
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer.json", tokenizer)
    _write_json(directory / "tokenizer_config.json", _special_tokens(meta))
    if meta.get("tokenizer.chat_template"):
        (directory / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], encoding="utf-8")


def _wanted(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array for name, array in weights.items() if name != ROPE_FACTORS}


def _config(meta: dict[str, Any], family: str, weights: dict[str, np.ndarray]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        return meta.get(f"{family}.{name}", default)

    heads = int(get("attention.head_count"))
    width = int(get("embedding_length"))
    head_dim = int(get("attention.key_length", width // heads))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(get("rope.freq_base", 10_000.0))}
    rope["partial_rotary_factor"] = int(get("rope.dimension_count", head_dim)) / head_dim
    scaling = get("rope.scaling.type", "none")
    if scaling != "none":
        rope |= {"rope_type": scaling, "factor": float(get("rope.scaling.factor", 1.0))}
        rope["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
    if ROPE_FACTORS in weights:
        rope |= {"rope_type": "factors", "factors": [float(f) for f in weights[ROPE_FACTORS]]}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": int(weights["token_embd.weight"].shape[0]),
        "hidden_size": width,
        "num_hidden_layers": int(get("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head_dim,
        "intermediate_size": int(get("feed_forward_length")),
        "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
        "max_position_embeddings": int(get("context_length", 2048)),
        "rope_parameters": rope,
        "attention_bias": family == "llama" and "blk.0.attn_q.bias" in weights,
        "tie_word_embeddings": "output.weight" not in weights,
        "hidden_act": "silu",
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def _rename(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; unknown names pass and are refused later."""
    parts = name.split(".")
    if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_TENSORS:
        return f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.{parts[3]}"
    return f"{TENSORS.get(parts[0], parts[0])}.{'.'.join(parts[1:])}"


def _restored(name: str, array: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Undo the permutation of q and k rows: llama.cpp stores a head's row pairs (b, b + D/2) next to each other."""
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if config["model_type"] != "llama" or part not in ("attn_q", "attn_k"):
        return array
    heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
    paired = array.reshape(heads, array.shape[0] // heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def _narrowest(array: np.ndarray) -> Tensor:
    exact = torch.from_numpy(np.array(array, dtype=np.float32))
    sample = exact.flatten()[:: max(1, exact.numel() // 4096)]
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(sample.to(dtype).float(), sample) and torch.equal(exact.to(dtype).float(), exact):
            return exact.to(dtype)
    return exact


def _special_tokens(meta: dict[str, Any]) -> dict[str, Any]:
    tokens = meta["tokenizer.ggml.tokens"]
    ids = {kind: meta.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos", "unknown", "padding")}
    short = {"unknown": "unk", "padding": "pad"}
    return {f"{short.get(kind, kind)}_token": tokens[i] for kind, i in ids.items() if i is not None}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True), encoding="utf-8")
